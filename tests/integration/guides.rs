//! The commands of README and docs: each is run here as it stands there, or is told of with the test that runs it; all of `stoke`'s are understood by it.
//! A command that somebody adds to a page and nobody runs fails. Of docs/gpu.md alone nothing is run: it compiles LLVM's bindings and needs a GPU.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use crate::harness::{Background, Ended, binary, root, stoke};

/// Who runs a command that is not run here: a test of this folder (`module::name`), or a script of the repository.
struct Elsewhere {
    page: &'static str,
    /// How the command begins.
    command: &'static str,
    by: &'static str,
}

const fn elsewhere(page: &'static str, command: &'static str, by: &'static str) -> Elsewhere {
    Elsewhere { page, command, by }
}

/// Follows the whole page.
const OWN_TRAINER: &str = "own_trainer::the_guide_leads_from_an_empty_folder_to_the_same_bits_through_a_killed_rank";

const ELSEWHERE: &[Elsewhere] = &[
    elsewhere(
        "README.md",
        "cargo run --release -- run",
        "training::domains_end_with_the_same_weights_on_one_two_and_three_ranks",
    ),
    elsewhere("README.md", "./check.sh", ".ci/run"),
    elsewhere("README.md", "printf 'paypal", "training::predict_classifies_lines_from_standard_input"),
    elsewhere("README.md", "python3 jobs/models/fetch.py", "check.sh"),
    elsewhere(
        "README.md",
        "target/release/stoke run jobs/specs/serve-smollm2.toml",
        "serving::every_cut_of_a_model_over_ranks_gives_the_same_answers",
    ),
    elsewhere(
        "README.md",
        "target/release/stoke infer",
        "inference::an_answer_is_that_of_transformers_on_the_same_weights",
    ),
    elsewhere(
        "README.md",
        "target/release/stoke run jobs/specs/language.toml",
        "language::a_language_model_is_trained_through_a_death_exported_served_and_trained_further",
    ),
    elsewhere(
        "README.md",
        "target/release/stoke checkpoint export",
        "language::a_language_model_is_trained_through_a_death_exported_served_and_trained_further",
    ),
    elsewhere(
        "README.md",
        "target/release/stoke run jobs/specs/ppo-cartpole.toml",
        "rl::ranks_that_are_killed_change_no_bit_of_what_is_learned",
    ),
    elsewhere(
        "README.md",
        "target/release/stoke submit jobs/specs/torch-ddp.toml",
        "exec::a_script_for_torchrun_runs_as_it_is_is_killed_and_goes_on_from_its_snapshot",
    ),
    elsewhere("README.md", "stoke scale", "control::a_job_is_resized_while_it_runs_and_ends_with_the_same_bits"),
    elsewhere(
        "README.md",
        "stoke drain",
        "nodes::a_drained_node_is_left_by_its_ranks_between_two_steps_and_can_be_stopped",
    ),
    elsewhere("README.md", "stoke logs", "control::logs_are_followed_to_the_end_of_the_job"),
    elsewhere("README.md", "stoke checkpoint list", "training::a_checkpoint_is_verified_byte_by_byte"),
    elsewhere(
        "README.md",
        "stoke checkpoint prune",
        "pruning::a_pinned_checkpoint_outlasts_keep_and_prunes_until_it_is_unpinned",
    ),
    elsewhere(
        "README.md",
        "stoke coordinator",
        "namespaces::machines_of_their_own_train_the_same_bits_whatever_happens_to_the_network_and_the_coordinator",
    ),
    elsewhere("README.md", "stoke --cluster", "bad_token::a_token_is_for_one_role"),
    elsewhere(
        "README.md",
        "stoke node",
        "namespaces::machines_of_their_own_train_the_same_bits_whatever_happens_to_the_network_and_the_coordinator",
    ),
    elsewhere("docs/api.md", "cd ~/prod", "api::api_lets_in_users_with_their_roles_and_nobody_else"),
    elsewhere("docs/api.md", "curl --cacert", "api::api_lets_in_users_with_their_roles_and_nobody_else"),
    elsewhere("docs/bare-metal.md", "cargo build", "check.sh"),
    elsewhere("docs/bare-metal.md", "cargo install cargo-deb", "tests/deploy/ansible.sh"),
    elsewhere("docs/bare-metal.md", "packaging/deb.sh", "tests/deploy/ansible.sh"),
    elsewhere("docs/bare-metal.md", "cd ansible", "tests/deploy/ansible.sh"),
    elsewhere("docs/bare-metal.md", "ansible-playbook", "tests/deploy/ansible.sh"),
    elsewhere(
        "docs/bare-metal.md",
        "stoke coordinator --config",
        "namespaces::machines_of_their_own_train_the_same_bits_whatever_happens_to_the_network_and_the_coordinator",
    ),
    elsewhere("docs/bare-metal.md", "stoke --cluster /var/lib/stoke status", "control::a_job_is_seen_from_every_side"),
    elsewhere(
        "docs/bare-metal.md",
        "stoke --cluster /var/lib/stoke token",
        "bad_token::a_revoked_token_is_refused_and_listed",
    ),
    elsewhere(
        "docs/bare-metal.md",
        "stoke node --config",
        "namespaces::machines_of_their_own_train_the_same_bits_whatever_happens_to_the_network_and_the_coordinator",
    ),
    elsewhere("docs/bare-metal.md", "export STOKE_CLUSTER", "bad_token::a_token_is_used_once"),
    elsewhere("docs/bare-metal.md", "stoke login", "bad_token::a_token_is_used_once"),
    elsewhere("docs/bare-metal.md", "stoke nodes", "control::a_job_is_seen_from_every_side"),
    elsewhere(
        "docs/bare-metal.md",
        "stoke submit",
        "training::digits_end_with_the_same_weights_on_one_two_and_three_ranks",
    ),
    elsewhere("docs/bare-metal.md", "stoke checkpoint verify", "training::a_checkpoint_is_verified_byte_by_byte"),
    elsewhere(
        "docs/chaos.md",
        "stoke run jobs/specs/domains.toml",
        "chaos::ranks_that_are_killed_again_and_again_change_no_bit",
    ),
    elsewhere(
        "docs/chaos.md",
        "stoke up --nodes 3; stoke submit SPEC; stoke chaos",
        "chaos::jobs_of_a_cluster_that_stays_go_on_under_faults",
    ),
    elsewhere("docs/clouds.md", "cd terraform", "tests/deploy/terraform.sh"),
    elsewhere("docs/clouds.md", "terraform", "tests/deploy/terraform.sh"),
    elsewhere("docs/clouds.md", "ssh ubuntu@ADDRESS", "bad_token::a_token_is_for_one_role"),
    elsewhere("docs/clouds.md", "STOKE_CLUSTER=~/lab stoke login", "bad_token::a_token_is_used_once"),
    elsewhere("docs/kubernetes.md", "cargo build --release --locked -p stoke-cli", "tests/deploy/image.sh"),
    elsewhere("docs/kubernetes.md", "docker", "tests/deploy/image.sh"),
    elsewhere("docs/kubernetes.md", "kubectl", "tests/deploy/kubernetes.sh"),
    elsewhere("docs/kubernetes.md", "helm", "tests/deploy/kubernetes.sh"),
    elsewhere("docs/kubernetes.md", "argo", "tests/deploy/kubernetes.sh"),
    elsewhere("docs/kubernetes.md", "STOKE_CLUSTER=ada stoke login", "bad_token::a_token_is_used_once"),
    elsewhere(
        "docs/language.md",
        "stoke up",
        "language::a_language_model_is_trained_through_a_death_exported_served_and_trained_further",
    ),
    elsewhere(
        "docs/language.md",
        "stoke submit",
        "language::a_language_model_is_trained_through_a_death_exported_served_and_trained_further",
    ),
    elsewhere(
        "docs/language.md",
        "stoke checkpoint export",
        "language::a_language_model_is_trained_through_a_death_exported_served_and_trained_further",
    ),
    elsewhere(
        "docs/language.md",
        "stoke serve",
        "language::a_language_model_is_trained_through_a_death_exported_served_and_trained_further",
    ),
    elsewhere(
        "docs/language.md",
        "curl -s GATEWAY",
        "language::a_language_model_is_trained_through_a_death_exported_served_and_trained_further",
    ),
    elsewhere(
        "docs/nodes.md",
        "stoke drain",
        "nodes::a_drained_node_is_left_by_its_ranks_between_two_steps_and_can_be_stopped",
    ),
    elsewhere("docs/nodes.md", "stoke node remove", "nodes::a_removed_node_is_refused_until_it_joins_again"),
    elsewhere(
        "docs/rl.md",
        "stoke run jobs/specs/ppo-cartpole.toml",
        "rl::cart_pole_is_solved_and_the_weights_are_the_same_on_one_two_and_three_nodes",
    ),
    elsewhere("docs/rl.md", "stoke eval", "rl::a_policy_is_evaluated_and_its_learning_is_drawn"),
    elsewhere("docs/rl.md", "stoke plot", "rl::a_policy_is_evaluated_and_its_learning_is_drawn"),
    elsewhere("docs/serving.md", "python3 jobs/models/fetch.py", "check.sh"),
    elsewhere("docs/serving.md", "stoke run", "serving::every_cut_of_a_model_over_ranks_gives_the_same_answers"),
    elsewhere(
        "docs/serving.md",
        "stoke up --nodes 3 && stoke serve",
        "serving::replicas_come_together_and_what_cannot_be_changed_is_said",
    ),
    elsewhere(
        "docs/serving.md",
        "stoke jobs; stoke explain",
        "serving::revisions_and_replicas_come_and_go_while_every_answer_is_whole",
    ),
    elsewhere(
        "docs/serving.md",
        "stoke explain",
        "splitting::a_model_that_fits_on_no_node_is_cut_over_two_and_answers_as_one_would",
    ),
    elsewhere(
        "docs/serving.md",
        "stoke serve",
        "serving::revisions_and_replicas_come_and_go_while_every_answer_is_whole",
    ),
    elsewhere("docs/serving.md", "curl", "serving::clients_that_nobody_here_wrote_work_unchanged"),
    elsewhere("docs/install.md", "cargo build", "check.sh"),
    elsewhere("docs/install.md", "stoke doctor", "lifecycle::doctor_looks_and_mends_nothing"),
    elsewhere("README.md", "cd examples/own-trainer", OWN_TRAINER),
    elsewhere("README.md", "../../target/release/stoke run spec.toml", OWN_TRAINER),
    elsewhere("docs/own-trainer.md", "", OWN_TRAINER),
    elsewhere(
        "README.md",
        "stoke top; stoke dashboard",
        "dashboard::top_prints_one_picture_as_text_and_takes_keys_on_a_terminal",
    ),
    elsewhere(
        "docs/dashboard.md",
        "stoke dashboard",
        "dashboard::a_job_is_started_watched_and_cancelled_in_a_browser_by_keyboard",
    ),
    elsewhere(
        "docs/dashboard.md",
        "ssh -L",
        "dashboard::a_job_is_started_watched_and_cancelled_in_a_browser_by_keyboard",
    ),
    elsewhere(
        "docs/dashboard.md",
        "stoke top",
        "dashboard::top_prints_one_picture_as_text_and_takes_keys_on_a_terminal",
    ),
    // LLVM is half an hour of compiling; whoever builds for GPUs does it once.
    elsewhere("docs/gpu.md", "", "docs/gpu.md"),
];

/// The commands of a page, in order, without prompts and comments.
fn commands(page: &str, text: &str) -> Vec<String> {
    let mut commands = Vec::new();
    let mut block: Option<(String, Vec<String>)> = None;
    for line in text.lines() {
        match (&mut block, line.strip_prefix("```")) {
            (None, Some(kind)) => block = Some((kind.to_owned(), Vec::new())),
            (Some(_), Some(_)) => {
                let (kind, lines) = block.take().expect("a block");
                commands.extend(of_block(&kind, &lines));
            }
            (Some((_, lines)), None) => match lines.last_mut().filter(|last| last.ends_with('\\')) {
                Some(last) => {
                    last.pop();
                    last.push_str(line.trim_start());
                }
                None => lines.push(line.to_owned()),
            },
            (None, None) => {}
        }
    }
    assert!(block.is_none(), "{page} has a block without an end");
    commands
}

fn of_block(kind: &str, lines: &[String]) -> Vec<String> {
    let prompt = |line: &String| {
        let (host, rest) = line.split_once('$')?;
        let is_prompt = host.chars().all(|char| char.is_ascii_alphanumeric()) && rest.starts_with(' ');
        is_prompt.then(|| rest.trim().to_owned())
    };
    let has_prompts = lines.iter().any(|line| prompt(line).is_some());
    let lines: Vec<String> = match kind {
        "console" | "" | "sh" if has_prompts => lines.iter().filter_map(prompt).collect(),
        "sh" => lines.to_vec(),
        "" => lines.iter().filter(|line| line.starts_with("stoke ")).cloned().collect(),
        _ => Vec::new(),
    };
    let bare = |line: &String| line.split("  #").next().unwrap_or_default().trim().to_owned();
    lines.iter().map(bare).filter(|line| !line.is_empty() && !line.starts_with('#')).collect()
}

/// README and docs with their paths.
fn pages() -> Vec<(String, String)> {
    let docs = std::fs::read_dir(root().join("docs")).expect("docs").map(|entry| entry.expect("an entry").path());
    let mut paths: Vec<_> = docs.filter(|path| path.extension().is_some_and(|kind| kind == "md")).collect();
    paths.sort();
    paths.insert(0, root().join("README.md"));
    let read = |path: &std::path::PathBuf| {
        let name = path.strip_prefix(root()).expect("it lies there").to_string_lossy().into_owned();
        (name, std::fs::read_to_string(path).expect("a page"))
    };
    paths.iter().map(read).collect()
}

fn is_there(by: &str) -> bool {
    match by.split_once("::") {
        Some((module, name)) => {
            let text = std::fs::read_to_string(root().join(format!("tests/integration/{module}.rs")));
            text.is_ok_and(|text| text.contains(&format!("fn {name}(")))
        }
        None => root().join(by).exists(),
    }
}

/// What `stoke` is called with in a line.
fn calls(line: &str) -> Vec<String> {
    let call = |part: &str| {
        let mut part = part.trim();
        while let Some((first, rest)) = part.split_once(' ')
            && first.contains('=')
        {
            part = rest;
        }
        let call = part.trim_start_matches("target/release/").strip_prefix("stoke ")?;
        Some(call.split(['<', '>']).next().unwrap_or_default().to_owned())
    };
    line.split([';', '|']).flat_map(|part| part.split("&&")).filter_map(call).collect()
}

#[test]
fn every_command_of_the_guides_is_run_by_a_test_and_understood() {
    let (mut missing, mut used) = (Vec::new(), BTreeSet::new());
    for (page, text) in pages() {
        for command in commands(&page, &text) {
            let found = ELSEWHERE.iter().position(|known| known.page == page && command.starts_with(known.command));
            match found {
                Some(at) => drop(used.insert(at)),
                None if HERE.contains(&(page.as_str(), command.as_str())) => {}
                None => missing.push(format!("{page}: {command}")),
            }
            for call in calls(&command) {
                let help = shell(Path::new("/"), &format!("stoke {call} --help"));
                assert_eq!(help.code(), 0, "{page}: stoke {call}\n{}", help.stderr);
            }
        }
    }
    assert!(
        missing.is_empty(),
        "no test is known to run these: name it in ELSEWHERE, or run them HERE:\n{}",
        missing.join("\n")
    );
    let stale = ELSEWHERE.iter().enumerate().filter(|(at, known)| !used.contains(at) || !is_there(known.by));
    let stale: Vec<_> = stale.map(|(_, known)| format!("{}: {} ({})", known.page, known.command, known.by)).collect();
    assert!(stale.is_empty(), "no such command stands there, or no such test is there:\n{}", stale.join("\n"));
}

/// In this order, a page after the other, each on a cluster of its own.
const HERE: &[(&str, &str)] = &[
    ("README.md", "stoke up --nodes 2"),
    ("README.md", "stoke submit jobs/specs/digits.toml"),
    ("README.md", "stoke status; stoke jobs; stoke nodes"),
    ("README.md", "stoke explain job-1"),
    ("README.md", "stoke down"),
    ("docs/rl.md", "stoke up --nodes 4 && stoke submit jobs/specs/ppo-cartpole.toml --wait"),
];

/// A line in a folder with the repository's specs, as a person would type it.
fn shell(folder: &Path, line: &str) -> Ended {
    let mut command = stoke(["--help"]);
    let environment: Vec<_> =
        command.get_envs().filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned()))).collect();
    command = Command::new("bash");
    let path =
        format!("{}:{}", binary().parent().expect("a folder").display(), std::env::var("PATH").unwrap_or_default());
    command.args(["-ec", line]).current_dir(folder).envs(environment).env("PATH", path).env("XDG_DATA_HOME", folder);
    command.env_remove("STOKE_CLUSTER").env_remove("RUST_LOG");
    Background::start(command).wait()
}

/// Ends the cluster of a folder also when a command failed.
struct Down<'a>(&'a Path);

impl Drop for Down<'_> {
    fn drop(&mut self) {
        shell(self.0, "stoke down || true");
    }
}

#[test]
fn commands_of_a_page_work_one_after_the_other() {
    for page in HERE.iter().map(|(page, _)| *page).collect::<BTreeSet<_>>() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::os::unix::fs::symlink(root().join("jobs"), folder.path().join("jobs")).expect("a link");
        let _down = Down(folder.path());
        for (_, line) in HERE.iter().filter(|(of, _)| *of == page) {
            shell(folder.path(), line).expect(0);
        }
    }
}
