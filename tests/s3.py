"""An S3 server on this machine (moto's), behind a proxy that makes faults, and a storage without conditional writes."""

import http.client
import logging
import socket
import struct
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Plain(MemoryFileSystem):
    """Objects in memory, of a storage that writes whatever it is told to."""

    protocol = "plain"
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("plain://", "memory://"))

    def pipe_file(self, path, value):
        self.store.pop(path, None)
        super().pipe_file(path, value)


fsspec.register_implementation("plain", Plain, clobber=True)


class Proxy(ThreadingHTTPServer):
    """Passes requests on. `fault(method, path)` names what happens to one, if anything.

    503: refused;  slow: later;  reset: the connection is, before the request is read;  lost: it is, after the request
    was carried out;  cut: it is, in the middle of the answer.
    """

    daemon_threads = True

    def __init__(self, host, port):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behind = (host, port)
        self.fault = lambda method, path: None
        self.seen = []  # method, path and fault of each request
        self.one_at_a_time = threading.Lock()  # a conditional put of moto's is none between threads

    def handle_error(self, request, client_address):
        pass  # clients that go away

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self):
        fault = self.server.fault(self.command, self.path)
        self.server.seen.append((self.command, self.path, fault))
        if fault == "reset":
            return self.reset()
        body = self.body()
        if fault == "slow":
            time.sleep(0.3)
        if fault == "503":
            return self.send(
                503, {"Content-Type": "application/xml"}, b"<Error><Code>ServiceUnavailable</Code></Error>"
            )
        with self.server.one_at_a_time:
            connection = http.client.HTTPConnection(*self.server.behind)
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            content, headers = response.read(), dict(response.getheaders())
            connection.close()
        if fault == "lost":
            return self.reset()
        if fault == "cut" and len(content) > 1:
            self.send(response.status, headers, content, content[: len(content) // 2])
            return self.reset()
        self.send(response.status, headers, content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        del self.headers["Transfer-Encoding"]
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def send(self, status, headers, content, sent=None):
        self.send_response(status)
        headers = {
            name: value for name, value in headers.items() if name.lower() not in ("transfer-encoding", "connection")
        }
        if self.command != "HEAD":
            headers = {name: value for name, value in headers.items() if name.lower() != "content-length"}
            headers["Content-Length"] = str(len(content))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if sent is None else sent)
        self.wfile.flush()

    def reset(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


@contextmanager
def server():
    """Run moto's server and a proxy in front of it; yield the proxy."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    proxy = Proxy(*moto.get_host_and_port())
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        moto.stop()
