"""An HTTP server on loopback that answers as a language model's endpoint does, and misbehaves when told
to."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "secret-4711"


def without_waiting(monkeypatch) -> list[float]:
  """Makes the client's pauses return at once; returns the list that their seconds are added to."""
  paused: list[float] = []

  async def sleep(seconds: float) -> None:
    paused.append(seconds)

  monkeypatch.setattr("pasta_jax.utils.calls._sleep", sleep)
  return paused


class Refusal(Exception):
  """What `Server.answer` raises to answer with a status and an object."""


class Server:
  """Answers a call with `answer(body, path)`.

  `faults` are done first, one a call, whatever the call is: a status, bytes to be sent, "hang up", "slow", a
  function that is given the handler, or None.
  """

  def __init__(self):
    self.calls: list[dict] = []
    self.headers: list[dict] = []
    self.faults: list = []
    self.status_body = b'{"error": "as asked"}'
    self.lock = threading.Lock()
    outer = self

    class Handler(BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def log_message(self, *args):
        pass

      def reply(self, status, body, headers=()):
        self.send_response(status)
        for name, value in headers:
          self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with outer.lock:
          outer.calls.append(body | {"path": self.path})
          outer.headers.append(dict(self.headers))
          fault = outer.faults.pop(0) if outer.faults else None
        if isinstance(fault, int):
          self.reply(fault, outer.status_body, [("Retry-After", "0")] if fault == 429 else ())
        elif fault == "hang up":
          self.close_connection = True
        elif fault == "slow":
          threading.Event().wait(1.5)
          self.reply(200, b"{}")
        elif callable(fault):
          fault(self)
        elif fault is not None:
          self.reply(200, fault)
        else:
          try:
            status, found = 200, outer.answer(body, self.path)
          except Refusal as refusal:
            status, found = refusal.args
          self.reply(status, json.dumps(found).encode())

    self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.http.daemon_threads = True
    threading.Thread(target=self.http.serve_forever, daemon=True).start()
    self.url = f"http://127.0.0.1:{self.http.server_port}"

  def answer(self, body: dict, path: str) -> dict:
    raise NotImplementedError

  def close(self) -> None:
    self.http.shutdown()
    self.http.server_close()
