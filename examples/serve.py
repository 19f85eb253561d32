"""Serve a compressed folder over HTTP: prepare it for this machine once, then answer prompts.

python examples/serve.py OUT [PORT]
curl --data 'The old house stood' http://127.0.0.1:8000
"""

import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from transformers import AutoModelForCausalLM, AutoTokenizer

import spectrim


def server(folder, port=8000, *, new_tokens=40):
    """A server of the standard library, for this machine alone, ready for `serve_forever`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    print(spectrim.prepare(model))  # weights in the order of this device's kernels
    one_at_a_time = threading.Lock()

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self):
            prompt = self.rfile.read(int(self.headers["Content-Length"])).decode()
            tokens = tokenizer(prompt, return_tensors="pt")
            with one_at_a_time:
                written = model.generate(**tokens, max_new_tokens=new_tokens, do_sample=False)
            body = tokenizer.decode(written[0], skip_special_tokens=True).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return HTTPServer(("127.0.0.1", int(port)), Answers)


if __name__ == "__main__":
    server(*sys.argv[1:]).serve_forever()
