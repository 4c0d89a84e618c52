"""A local server that speaks enough of the Hugging Face Hub's protocol.

It serves folders as model repositories to an unmodified `huggingface_hub`,
counts requests and fails on demand.
"""

import hashlib
import json
import re
import socket
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE_FILES = (".pkl", ".safetensors", ".h5")  # kept in LFS by the real Hub
RANGE = re.compile(r"bytes=(\d+)-(\d*)$")
API = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+)"
    r"(?:/(?P<what>revision|tree)/(?P<revision>[^/]+))?$"
)
RESOLVE = re.compile(
    r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)$"
)


class File:
    """A file of a repository and the names that git and LFS give it."""

    def __init__(self, name, data):
        self.name, self.data, self.size = name, data, len(data)
        header = b"blob %d\0" % self.size
        self.git = hashlib.sha1(header + data).hexdigest()
        self.large = name.endswith(LARGE_FILES)
        self.sha256 = hashlib.sha256(data).hexdigest()

    @property
    def etag(self):
        return self.sha256 if self.large else self.git

    def sibling(self):
        """The file as an entry of a model's information."""
        entry = {"rfilename": self.name, "size": self.size, "blobId": self.git}
        if self.large:
            entry["lfs"] = {
                "sha256": self.sha256,
                "size": self.size,
                "pointerSize": 130,
            }
        return entry

    def leaf(self):
        """The file as an entry of a tree."""
        entry = {
            "type": "file",
            "path": self.name,
            "size": self.size,
            "oid": self.git,
        }
        if self.large:
            entry["lfs"] = {
                "oid": self.sha256,
                "size": self.size,
                "pointerSize": 130,
            }
        return entry


@dataclass
class Repository:
    """Files by commit, and the commit of each branch."""

    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)


class HubServer:
    """Serves folders as Hub repositories on a free port of this machine.

    Faults are attributes that a test sets between requests; files are named
    as in the repository.

    Attributes:
        url: str. What `HF_ENDPOINT` must be.
        requests: list of `(method, path, headers)`, oldest first.
        token: str or None. Every request must carry it.
        gated: set of repositories whose files are refused.
        truncated: dict of file to the number of bytes that its body has.
        corrupt: set of files whose middle byte is flipped.
        dropped: dict of file to the number of bytes after which the
            connection is cut, once. Shorter bodies are left alone.

    Example:

    ```python
    with HubServer() as hub:
        commit = hub.add("owner/name", folder)
        environment = {"HF_ENDPOINT": hub.url}
    ```
    """

    def __init__(self):
        self.repositories = {}
        self.requests = []
        self.token = None
        self.gated = set()
        self.truncated = {}
        self.corrupt = set()
        self.dropped = {}
        self._connections = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self._server.handle_error = lambda *_: None
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}
        )

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """Closes the port and every open connection."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
            for connection in list(self._connections):
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # the other end was faster

    def add(self, repo, folder, branch="main"):
        """Publishes a folder as the newest commit of a branch.

        Returns:
            The commit, 40 hexadecimal digits.
        """
        folder = Path(folder)
        files = {
            name: File(name, path.read_bytes())
            for path in sorted(folder.rglob("*"))
            if path.is_file() and (name := path.relative_to(folder).as_posix())
        }
        listing = "".join(name + file.git for name, file in files.items())
        commit = hashlib.sha1(listing.encode()).hexdigest()
        repository = self.repositories.setdefault(repo, Repository())
        repository.commits[commit] = files
        repository.branches[branch] = commit
        return commit

    def downloads(self):
        """Number of times that each file's body was asked for."""
        return Counter(
            unquote(match["name"])
            for method, path, _ in self.requests
            if method == "GET" and (match := RESOLVE.match(path))
        )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self):
        return self.server.hub

    def setup(self):
        super().setup()
        self.hub._connections.add(self.connection)

    def finish(self):
        self.hub._connections.discard(self.connection)
        super().finish()

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        # A data set has the address of a model, but for one part.
        path = urlsplit(self.path).path
        path = path.replace("/api/datasets/", "/api/models/", 1)
        path = path.replace("/datasets/", "/", 1)
        self.hub.requests.append((self.command, path, dict(self.headers)))
        if self.hub.token is not None:
            received = self.headers.get("Authorization")
            if received is None:
                return self._refuse(401, "RepoNotFound", "Repository not found")
            if received != f"Bearer {self.hub.token}":
                message = "Invalid credentials in Authorization header"
                return self._refuse(401, None, message)
        match = API.match(path) or RESOLVE.match(path)
        if match is None:
            return self._refuse(404, None, "Not found")
        repository = self.hub.repositories.get(match["repo"])
        if repository is None:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        revision = unquote(match["revision"] or "main")
        commit = repository.branches.get(revision, revision)
        files = repository.commits.get(commit)
        if files is None:
            message = f"Invalid rev id: {revision}"
            return self._refuse(404, "RevisionNotFound", message)
        if match.re is RESOLVE:
            return self._send_file(match["repo"], commit, files, match["name"])
        if match["what"] == "tree":
            return self._send_json([file.leaf() for file in files.values()])
        self._send_json(
            {
                "id": match["repo"],
                "modelId": match["repo"],
                "sha": commit,
                "private": False,
                "gated": "manual" if match["repo"] in self.hub.gated else False,
                "siblings": [file.sibling() for file in files.values()],
            }
        )

    def _refuse(self, status, code, message, commit=None):
        body = json.dumps({"error": message}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Error-Message", message)
        if code is not None:
            self.send_header("X-Error-Code", code)
        if commit is not None:
            self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        self._write(body)

    def _send_json(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self._write(body)

    def _send_file(self, repo, commit, files, name):
        if repo in self.hub.gated:
            message = f"Access to model {repo} is restricted."
            return self._refuse(403, "GatedRepo", message)
        file = files.get(unquote(name))
        if file is None:
            return self._refuse(404, "EntryNotFound", "Entry not found", commit)
        body = file.data
        if file.name in self.hub.corrupt:
            middle = len(body) // 2
            flipped = bytes([body[middle] ^ 0xFF])
            body = body[:middle] + flipped + body[middle + 1 :]
        if self.command == "GET":
            body = body[: self.hub.truncated.get(file.name)]
        size = len(body)
        wanted = RANGE.match(self.headers.get("Range", ""))
        if wanted:
            start = int(wanted[1])
            if start >= size:
                return self._refuse(416, None, "Range not satisfiable")
            stop = min(size, int(wanted[2] or size) + 1)
            body = body[start:stop]
            self.send_response(206)
            self.send_header(
                "Content-Range", f"bytes {start}-{stop - 1}/{size}"
            )
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{file.etag}"')
        self.send_header("X-Repo-Commit", commit)
        if file.large:
            self.send_header("X-Linked-Etag", f'"{file.etag}"')
            self.send_header("X-Linked-Size", str(file.size))
        self.end_headers()
        drop = self.hub.dropped.get(file.name, len(body))
        if self.command == "GET" and drop < len(body):
            self._write(body[: self.hub.dropped.pop(file.name)])
            self.wfile.flush()
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        self._write(body)

    def _write(self, body):
        if self.command == "GET":
            self.wfile.write(body)


def environment(server, home):
    """Points `huggingface_hub` in a subprocess at a server."""
    return {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "KERAS_BACKEND": "jax",
        "JAX_NUM_CPU_DEVICES": "1",
    }
