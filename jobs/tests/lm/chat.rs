//! Chat templates: the text against transformers' rendering, and templates that are wrong.

use std::fs;

use serde_json::{Value, json};
use stoke_jobs::lm::{ChatTemplate, Message, ModelError, Tokenizer, Weights};

use crate::common::{golden, ids, model};
use crate::metadata::{Metadata, folder};

fn smollm2() -> Weights {
    Weights::open(&model("smollm2-135m-instruct").join("SmolLM2-135M-Instruct.Q4_1.gguf")).expect("the model opens")
}

fn messages(json: &Value) -> Vec<Message> {
    serde_json::from_value(json.clone()).unwrap()
}

fn user(content: &str) -> Vec<Message> {
    vec![Message { role: "user".into(), content: content.into() }]
}

/// A model with this template.
fn with(template: &str) -> Result<ChatTemplate, ModelError> {
    let metadata = Metadata::new(&["<s>", "</s>"], &[3, 3], &[]).string("tokenizer.chat_template", template);
    ChatTemplate::open(&metadata.u32("tokenizer.ggml.bos_token_id", 0).u32("tokenizer.ggml.eos_token_id", 1).weights())
}

#[test]
fn templates_render_as_transformers_renders_them() {
    let golden = golden("chat.json");
    for chat in golden["chats"].as_array().unwrap() {
        let name = format!("{} {} {}", chat["template"], chat["chat"], chat["add_generation_prompt"]);
        let template = with(golden["templates"][chat["template"].as_str().unwrap()].as_str().unwrap()).unwrap();
        let rendered = template.render(&messages(&chat["messages"]), chat["add_generation_prompt"].as_bool().unwrap());
        match chat["refused"].as_str() {
            Some(words) => {
                let error = rendered.expect_err(&name);
                assert!(
                    matches!(error, ModelError::Chat { .. }) && error.to_string().contains(words),
                    "{name}: {error}"
                );
            }
            None => assert_eq!(rendered.expect(&name), chat["rendered"].as_str().unwrap(), "{name}"),
        }
    }
}

#[test]
fn chats_of_the_real_model_have_the_tokens_of_the_reference() {
    let weights = smollm2();
    let (tokenizer, template) = (Tokenizer::open(&weights).unwrap(), ChatTemplate::open(&weights).unwrap());
    let expected = golden("smollm2.json");
    for (prompt, expected) in
        golden("prompts.json").as_array().unwrap().iter().zip(expected["prompts"].as_array().unwrap())
    {
        assert_eq!(prompt["name"], expected["name"]);
        if prompt["messages"].is_array() {
            let text = template.render(&messages(&prompt["messages"]), true).unwrap();
            assert_eq!(text, expected["text"].as_str().unwrap(), "{}", prompt["name"]);
            assert_eq!(tokenizer.encode(&text).unwrap(), ids(&expected["prompt"]), "{}", prompt["name"]);
        }
    }
}

#[test]
fn a_template_is_found_in_each_place_where_folders_have_it() {
    let rendered = |config: Value, beside: Option<&str>| {
        let folder = folder(&json!({}), &json!({}));
        fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        if let Some(text) = beside {
            fs::write(folder.path().join("chat_template.jinja"), text).unwrap();
        }
        ChatTemplate::open(&Weights::open(folder.path()).unwrap()).unwrap().render(&user("hi"), true).unwrap()
    };
    let text = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}";
    let tokens = json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>"});
    let config = |template: Value| {
        let mut config = tokens.clone();
        config["chat_template"] = template;
        config
    };
    assert_eq!(rendered(config(json!(text)), None), "<s>hi</s>");
    let list = json!([{"name": "tool_use", "template": "no"}, {"name": "default", "template": text}]);
    assert_eq!(rendered(config(list), None), "<s>hi</s>");
    assert_eq!(rendered(tokens.clone(), Some(text)), "<s>hi</s>");
    assert_eq!(rendered(config(json!("other")), Some(text)), "<s>hi</s>");
    assert_eq!(rendered(config(json!(null)), Some("{{ eos_token }}")), "</s>");
}

#[test]
fn a_template_can_tell_the_day() {
    let text =
        with("{{ strftime_now('%Y-%m-%d') }} {{ strftime_now('%d %b %Y') }}").unwrap().render(&user(""), true).unwrap();
    let (year, month) = (&text[..4], &text[5..7]);
    assert!(year >= "2025" && ("01"..="12").contains(&month) && text.ends_with(year), "{text}");
    let error = with("{{ strftime_now('%Q') }}").unwrap().render(&user(""), true).unwrap_err().to_string();
    assert!(error.contains("strftime_now(\"%Q\")"), "{error}");
}

#[test]
fn wrong_templates_are_refused_when_they_are_read() {
    for (template, words) in [
        ("{% for message in messages %}", "chat template"),
        ("{{ messages[0] ", "chat template"),
        ("{% made_up %}", "made_up"),
        ("{{ messages | made_up }}", ""),
    ] {
        // What is only found out when it runs is an error of the chat, not of the file.
        match with(template) {
            Err(error) => {
                let text = error.to_string();
                assert!(
                    matches!(error, ModelError::Template { .. }) && text.contains(words) && text.contains("(help: "),
                    "{text}"
                );
            }
            Ok(template) => assert!(matches!(template.render(&user("hi"), true), Err(ModelError::Chat { .. }))),
        }
    }
    let error = with(&" ".repeat((1 << 20) + 1)).unwrap_err().to_string();
    assert!(error.contains("has 1048577 bytes, the limit is 1048576"), "{error}");
    let absent = ChatTemplate::open(&Metadata::new(&["a"], &[1], &[]).weights()).unwrap_err();
    assert!(matches!(absent, ModelError::Template { .. }) && absent.to_string().contains("is not there"), "{absent}");
    let empty = folder(&json!({}), &json!({}));
    let absent = ChatTemplate::open(&Weights::open(empty.path()).unwrap()).unwrap_err();
    assert!(absent.to_string().contains("tokenizer_config.json"), "{absent}");
}

#[test]
fn a_template_without_end_is_stopped() {
    for template in [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(text='aaaaaaaaaaaaaaaa') %}{% for a in range(64) %}{% set ns.text = ns.text ~ ns.text %}{% endfor %}",
        "{{ 'a' * 100000000000 }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ 'x' | indent(1000000000000) }}",
    ] {
        let error = with(template).unwrap().render(&user("hi"), true).unwrap_err();
        assert!(matches!(error, ModelError::Chat { .. }), "{template}: {error}");
    }
    // A long chat is nowhere near the limit.
    let long: Vec<Message> = (0..1000)
        .map(|turn| Message { role: ["user", "assistant"][turn % 2].into(), content: "word ".repeat(90) })
        .collect();
    let text = ChatTemplate::open(&smollm2()).unwrap().render(&long, true).unwrap();
    assert!(text.len() > 450_000);
}

#[test]
fn what_a_message_says_is_not_read_as_a_template() {
    let text = with("{% for m in messages %}{{ m.content }}{% endfor %}").unwrap();
    assert_eq!(text.render(&user("{{ 1 + 1 }} {% raw %} <b>&</b>"), true).unwrap(), "{{ 1 + 1 }} {% raw %} <b>&</b>");
}
