"""A folder made by hub.mirror, served as a Hub that can only be read: what HF_ENDPOINT may point to."""

from __future__ import annotations

import json
import re
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fdconv_zoo.download import Source

RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?")


class MirrorHandler(SimpleHTTPRequestHandler):
    """Python's file server, with the Hub's addresses and headers.

    Only files of the index are found, so no path can lead out of the folder.
    """

    source: Source | None = None
    error_code: str | None = None

    def __init__(self, *args: object, index: dict[tuple[str, str], Source], **kwargs: object) -> None:
        self.index = index
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        match = INFO.fullmatch(self.url_path)
        if not match:
            return super().do_GET()
        files = [source for source in self.index.values() if source.repo == match["repo"]]
        if not files or match["revision"] not in (None, "main", files[0].commit):
            return self.send_error(HTTPStatus.NOT_FOUND)
        siblings = [{"rfilename": source.file} for source in files]
        body = json.dumps({"id": match["repo"], "sha": files[0].commit, "tags": [], "siblings": siblings}).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    @property
    def url_path(self) -> str:
        return unquote(urlsplit(self.path).path)

    def translate_path(self, path: str) -> str:
        match = RESOLVE.fullmatch(self.url_path)
        source = match and self.index.get((match["repo"], match["file"]))
        if not source or match["revision"] not in ("main", source.commit):
            self.error_code = "RevisionNotFound" if source else "EntryNotFound"
            return str(Path(self.directory, "no such file"))
        self.source = source
        return str(Path(self.directory, source.repo, source.file))

    def end_headers(self) -> None:
        if self.error_code:  # decides which exception huggingface_hub raises
            self.send_header("X-Error-Code", self.error_code)
        elif self.source:
            self.send_header("X-Repo-Commit", self.source.commit)
            self.send_header("ETag", f'"{self.source.sha256}"')
            self.send_header("X-Linked-Size", str(self.source.size))
        super().end_headers()


def serve(folder: Path, index: dict[tuple[str, str], Source], host: str, port: int) -> None:
    """Serve until interrupted."""
    handler = partial(MirrorHandler, directory=str(folder), index=index)
    with ThreadingHTTPServer((host, port), handler) as server:
        print(f"{len(index)} files at HF_ENDPOINT=http://{host}:{server.server_port} (Ctrl-C to stop)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")
