"""Serves an exported model over HTTP, by Python's own server.

    python serve_http.py exported --port 8000
    curl localhost:8000/predict -d '[{"user": 17, "genres": ["Drama"], "price": 9.5}]'

GET / tells which columns a row has, and the labels. POST /predict takes a list of rows and answers
with a score for each, or a list of scores where there are several labels; a wrong row gets status
400 and a sentence. It is for a network that you trust: it knows no users, and one request at a time
uses the processor.
"""

from __future__ import annotations

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import bagpipe.serving
from bagpipe import BagpipeError

MOST_BYTES = 16 << 20  # of a request


class Handler(BaseHTTPRequestHandler):
    """Answers requests by the model of the server."""

    model: bagpipe.serving.ServedModel
    turn = threading.Lock()  # torch shares each call's work among its threads already

    def do_GET(self) -> None:
        """Tells which columns a row has, and what is predicted."""
        if self.path == "/":
            self._answer(200, {**self.model.columns.as_dict(), "labels": self.model.labels})
        else:
            self._answer(404, {"error": "GET / or POST /predict"})

    def do_POST(self) -> None:
        """Predicts a list of rows."""
        num_bytes = int(self.headers.get("Content-Length", 0))
        if self.path != "/predict" or num_bytes > MOST_BYTES:
            self._answer(404, {"error": f"POST /predict, of at most {MOST_BYTES:,} bytes"})
            return
        try:
            rows = json.loads(self.rfile.read(num_bytes))
            with self.turn:
                scores = self.model.predict(rows)
        except (BagpipeError, ValueError) as error:
            self._answer(400, {"error": str(error)})
            return
        self._answer(200, {"scores": scores.tolist()})

    def _answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    """Loads a model and serves it until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Serve a model that `bagpipe export` has written.")
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    arguments = parser.parse_args()
    Handler.model = bagpipe.serving.load(arguments.folder)
    with ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)  # noqa: T201
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
