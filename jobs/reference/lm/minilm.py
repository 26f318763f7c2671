"""Golden embeddings of all-MiniLM-L6-v2: sentence-transformers' own modules (transformers' BertModel, pooling, normalisation) on the real
folder. Nothing of the model is written here.

Products in 64-bit floats; `float32_error` is how far the same model in 32 bits is from them, at most, in any value. Values are written in
millionths: a cosine does not see the rest."""

import argparse
import json
import sys
from pathlib import Path

import sentence_transformers
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize, Pooling, Transformer

# transformers asks CUDA whether it records, and cuda_stubs.py has no answer.
torch.cuda.is_current_stream_capturing = lambda: False

TEXTS = [
    "",
    " ",
    "a",
    "?",
    "\u200b",
    "220 mail.example.org ESMTP Postfix (Debian/GNU)",
    "SSH-2.0-OpenSSH_9.6p1 Ubuntu-3ubuntu13.5",
    "SSH-2.0-dropbear_2022.83",
    "220 ProFTPD 1.3.5e Server (Debian) [::ffff:192.0.2.7]",
    "+OK Dovecot ready.",
    "* OK [CAPABILITY IMAP4rev1 SASL-IR LOGIN-REFERRALS ID ENABLE IDLE STARTTLS AUTH=PLAIN] ready",
    "-ERR unknown command 'HELP'",
    "RFB 003.008",
    "HTTP/1.1 200 OK\r\nServer: nginx/1.24.0\r\nContent-Type: text/html; charset=utf-8\r\nConnection: keep-alive\r\n\r\n",
    "HTTP/1.1 301 Moved Permanently\r\nLocation: https://example.com/login?next=%2Fadmin\r\nServer: cloudflare\r\n",
    "HTTP/1.0 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"RT-AC68U\"\r\n",
    "<html><head><title>Login - pfSense</title></head><body class=\"login\"></body></html>",
    "CN=*.example.com, O=Example Inc., L=Dublin, C=IE",
    "C=US, O=Let's Encrypt, CN=R11",
    "CN=localhost.localdomain, OU=SomeOrganizationalUnit, O=SomeOrganization, ST=SomeState, C=--",
    "emailAddress=root@host-203-0-113-9, CN=host-203-0-113-9",
    "ec2-198-51-100-23.eu-west-1.compute.amazonaws.com",
    "xn--bcher-kva.example",
    "vpn01.corp.internal",
    "2001:db8::8a2e:370:7334",
    "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "-----BEGIN CERTIFICATE-----\nMIIBszCCAVmgAwIBAgIUE2x7oT4m0o1d0p6m9o4qg3h0S3cwCgYIKoZIzj0EAwIw\n",
    "What is the capital of France?",
    "Paris is the capital of France.",
    "An industrial controller answers on port 502 (Modbus).",
    "Ein Router mit veralteter Firmware antwortet auf Port 8080.",
    "Le serveur a refusé la connexion : certificat expiré depuis l'été.",
    "El dispositivo respondió después de tres segundos.",
    "サーバーは応答しませんでした。",
    "服务器没有响应",
    "сервер не отвечает",
    "لم يستجب الخادم",
    "emoji 🚀🔥 and a família 👨‍👩‍👧",
    "[CLS] [SEP] [MASK] [PAD] spelt out [UNK]",
    "ÀÉÎÕÜ ßþðæø naïve café",
    "x" * 300,
    "port 443 open; " * 120,
    "TLSv1.3 TLS_AES_256_GCM_SHA384 " * 20 + "[CLS]",
    "[CLS] " * 300,
    " ".join(f"host-{n}.example.net" for n in range(200)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("golden", type=Path, help="folder; minilm.json is written there")
    args = parser.parse_args()
    transformer = Transformer(str(args.model))
    pooling = Pooling.load(str(args.model / "1_Pooling"))
    model = SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu").eval()
    # As published. The folder has no modules.json, so its own file is not looked for.
    model.max_seq_length = json.loads((args.model / "sentence_bert_config.json").read_text())["max_seq_length"]
    # One at a time: no padding.
    narrow = [model.encode(text, show_progress_bar=False) for text in TEXTS]
    model.double()
    lines, error = [], 0.0
    for text, in_32 in zip(TEXTS, narrow):
        wide = torch.from_numpy(model.encode(text, show_progress_bar=False)).double()
        error = max(error, (torch.from_numpy(in_32).double() - wide).abs().max().item())
        ids = model.preprocess([text])["input_ids"][0].tolist()
        lines.append(json.dumps({"text": text, "ids": ids, "millionths": [round(value * 1e6) for value in wide.tolist()]}))
    head = {
        "made_by": f"sentence-transformers {sentence_transformers.__version__}, torch {torch.__version__}",
        "float32_error": float(f"{error:.1e}"),
    }
    body = json.dumps(head)[:-1] + ', "texts": [\n' + ",\n".join(lines) + "\n]}\n"
    (args.golden / "minilm.json").write_text(body)
    print(f"float32 error {error:.1e}, {len(body)} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
