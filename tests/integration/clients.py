"""Clients that nobody here wrote, unchanged: the openai package, and tritonclient over HTTP and gRPC. Called by serving.rs.

usage: clients.py GATEWAY CHAT_MODEL EMBEDDING_MODEL     (GATEWAY: host:port)
Prints one JSON document with what the clients were told; the test compares it with what `stoke` itself says.
"""

import json
import sys

import numpy
import openai
import tritonclient.grpc
import tritonclient.http
import tritonclient.utils

gateway, chat_model, embedding_model = sys.argv[1:]
messages = [{"role": "user", "content": "Tell me about TLS."}]
texts = ["nginx/1.24.0 (Ubuntu)", "SSH-2.0-OpenSSH_9.6"]


def with_openai() -> dict:
    client = openai.OpenAI(base_url=f"http://{gateway}/v1", api_key="none", max_retries=0)
    told = {"models": sorted(model.id for model in client.models.list())}
    whole = client.chat.completions.create(model=chat_model, messages=messages, temperature=0, max_tokens=24)
    told["chat"] = whole.choices[0].message.content
    told["finish_reason"] = whole.choices[0].finish_reason
    told["completion_tokens"] = whole.usage.completion_tokens
    stream = client.chat.completions.create(
        model=chat_model, messages=messages, temperature=0, max_tokens=24, stream=True, stream_options={"include_usage": True}
    )
    pieces = list(stream)
    told["streamed"] = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    told["streamed_tokens"] = pieces[-1].usage.completion_tokens
    stopped = client.chat.completions.create(model=chat_model, messages=messages, temperature=0, max_tokens=24, stop=["."])
    told["stopped"] = stopped.choices[0].message.content
    drawn = [client.completions.create(model=chat_model, prompt="220 ", max_tokens=8, temperature=0.9, seed=seed).choices[0].text for seed in (1, 1, 2)]
    told["drawn"] = drawn
    embeddings = client.embeddings.create(model=embedding_model, input=texts)
    told["embeddings"] = [item.embedding for item in embeddings.data]
    for name, call in {
        "unknown_model": lambda: client.chat.completions.create(model="nobody", messages=messages),
        "negative_temperature": lambda: client.chat.completions.create(model=chat_model, messages=messages, temperature=-1),
        "wrong_task": lambda: client.embeddings.create(model=chat_model, input="x"),
    }.items():
        try:
            call()
            told[name] = "no error"
        except openai.APIStatusError as error:
            told[name] = [type(error).__name__, error.status_code, error.message]
    return told


def with_triton(module, url: str) -> dict:
    client = module.InferenceServerClient(url)
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready(chat_model) and client.is_model_ready(embedding_model)
    try:
        assert not client.is_model_ready("nobody")
    except tritonclient.utils.InferenceServerException as error:
        assert "there is" in error.message(), error
    told = {}
    text = module.InferInput("text", [len(texts)], "BYTES")
    text.set_data_from_numpy(numpy.array(texts, dtype=object))
    told["embeddings"] = client.infer(embedding_model, [text]).as_numpy("embedding").tolist()
    prompt = module.InferInput("text", [1], "BYTES")
    prompt.set_data_from_numpy(numpy.array(["220 smtp.example.org ESMTP"], dtype=object))
    answer = client.infer(chat_model, [prompt], parameters={"max_tokens": 8, "temperature": 0})
    told["text"] = answer.as_numpy("text")[0].decode()
    metadata = client.get_model_metadata(embedding_model)
    told["inputs"] = [one["name"] for one in metadata["inputs"]] if isinstance(metadata, dict) else [one.name for one in metadata.inputs]
    return told


print(json.dumps({
    "openai": with_openai(),
    "http": with_triton(tritonclient.http, gateway),
    "grpc": with_triton(tritonclient.grpc, gateway),
}))
