"""A hub's files over real HTTP on loopback, with Range and If-Range, and everything that may go wrong."""

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer:
    """`files` by path below `/v1/fleet/`; `asked` is what was asked for, with the Range or None."""

    def __init__(self):
        self.files = {}
        self.etags = {}
        self.asked = []
        self.authorization = set()
        self.cuts = {}
        """By path: after how many bytes each of the next answers ends."""
        self.status = {}
        self.endless = set()
        self.on_get = lambda path: None
        self.does_ranges = True
        self.sent = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.http.server_port}/v1/fleet"

    def answer(self, request):
        path = request.path.removeprefix("/v1/fleet/")
        ranged = request.headers.get("Range")
        self.asked.append((path, ranged))
        self.authorization.add(request.headers.get("Authorization"))
        self.on_get(path)
        content = self.files.get(path)
        if path in self.status or content is None:
            request.send_error(self.status.get(path, 404))
            return
        etag = self.etags.get(path, f'"{path}"')
        start = 0
        if ranged and self.does_ranges and request.headers.get("If-Range") == etag:
            start = int(re.fullmatch(r"bytes=(\d+)-", ranged)[1])
        if start and start >= len(content):
            request.send_error(416)
            return
        request.send_response(206 if start else 200)
        request.send_header("ETag", etag)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if path not in self.endless:
            request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        cuts = self.cuts.get(path)
        body = content[start:] if not cuts else content[start : start + cuts.pop(0)]
        try:
            request.wfile.write(body)
            self.sent += len(body)
            while path in self.endless:
                request.wfile.write(bytes(65536))
                self.sent += 65536
        except OSError:
            # Whoever asked had enough.
            pass
        request.close_connection = True
