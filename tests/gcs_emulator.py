"""Google Cloud Storage in memory, behind its own JSON interface over HTTP.

Only what gcsfs, TensorStore and google-cloud-storage ask for in these tests.
Other emulators leave out the generations by which TensorStore makes sure that
it overwrites nothing but what it has read. Not a test itself.

https://cloud.google.com/storage/docs/json_api/v1
"""

import http.server
import itertools
import json
import re
import sys
import threading
import urllib.parse
from typing import NamedTuple

_OBJECT = re.compile(r"/storage/v1/b/(?P<bucket>[^/]+)/o/(?P<name>[^/]+)")
_BUCKET = re.compile(r"/storage/v1/b/(?P<bucket>[^/]+)(?P<is_list>/o)?")
_UPLOAD = re.compile(r"/upload/storage/v1/b/(?P<bucket>[^/]+)/o")
_UPDATED = "2026-01-02T03:04:05.678Z"


class Object(NamedTuple):
  """An object of a bucket; another generation whenever it is written."""

  content: bytes
  generation: int


class Refusal(Exception):
  """An answer that is an error."""

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


class Emulator:
  """A server of buckets, in threads of this process; a context manager.

  Attributes:
    url: What clients should take for https://storage.googleapis.com.
    buckets: The objects by name, by bucket; may be changed at any time.
    forbidden: Buckets that answer 403 to all requests.
    read_only: Buckets that answer 403 to those that change them.
    without_metadata: Buckets that answer 403 to those about themselves.
  """

  def __init__(self):
    self.buckets: dict[str, dict[str, Object]] = {}
    self.forbidden: set[str] = set()
    self.read_only: set[str] = set()
    self.without_metadata: set[str] = set()
    self.uploads: dict[str, tuple[str, dict[str, str], bytearray]] = {}
    self.lock = threading.RLock()
    self.counter = itertools.count(1_000_000)
    handler = type("Handler", (_Handler,), {"emulator": self})
    self._server = _Server(("127.0.0.1", 0), handler)
    self.url = f"http://127.0.0.1:{self._server.server_port}"

  def __enter__(self) -> "Emulator":
    threading.Thread(
      target=self._server.serve_forever, args=(0.05,), daemon=True
    ).start()
    return self

  def __exit__(self, *_) -> None:
    self._server.shutdown()
    self._server.server_close()

  def content(self, path: str) -> bytes:
    """Of `BUCKET/NAME`."""
    bucket, name = path.split("/", 1)
    return self.buckets[bucket][name].content

  def text(self, path: str) -> str:
    """Of `BUCKET/NAME`."""
    return self.content(path).decode()

  def write(self, path: str, content: bytes | str) -> str:
    """Writes `BUCKET/NAME`, makes the bucket, and returns the gs:// path."""
    bucket, name = path.split("/", 1)
    self.buckets.setdefault(bucket, {})
    content = content.encode() if isinstance(content, str) else content
    self.put(bucket, name, content, {})
    return f"gs://{path}"

  def names(self, path: str) -> list[str]:
    """Names of the objects that begin with `BUCKET/PREFIX`, without that."""
    bucket, prefix = path.split("/", 1)
    names = sorted(self.buckets[bucket])
    return [n.removeprefix(prefix) for n in names if n.startswith(prefix)]

  def objects(self, bucket: str) -> dict[str, Object]:
    """Those of a bucket that may be read."""
    if bucket in self.forbidden:
      raise Refusal(403, f"caller does not have access to {bucket}")
    if bucket not in self.buckets:
      raise Refusal(404, "The specified bucket does not exist.")
    return self.buckets[bucket]

  def get(self, bucket: str, name: str, query: dict[str, str]) -> Object:
    """An object, if its generation is as asked for."""
    found = self.objects(bucket).get(name)
    self._check_generation(found, query)
    if found is None:
      raise Refusal(404, f"No such object: {bucket}/{name}")
    return found

  def put(
    self, bucket: str, name: str, content: bytes, query: dict[str, str]
  ) -> dict:
    """Writes an object, if what it replaces is as asked for."""
    with self.lock:
      self.check_writable(bucket)
      objects = self.buckets[bucket]
      self._check_generation(objects.get(name), query)
      objects[name] = Object(bytes(content), next(self.counter))
      return resource(bucket, name, objects[name])

  def delete(self, bucket: str, name: str, query: dict[str, str]) -> None:
    """Deletes an object, if it is as asked for."""
    with self.lock:
      self.check_writable(bucket)
      self.get(bucket, name, query)
      del self.buckets[bucket][name]

  def list(self, bucket: str, query: dict[str, str]) -> dict:
    """A page of objects and of folders."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    found: dict[str, Object | None] = {}
    with self.lock:
      for name, value in sorted(self.objects(bucket).items()):
        if not name.startswith(prefix):
          continue
        cut = name.find(delimiter, len(prefix)) if delimiter else -1
        found |= {name: value} if cut < 0 else {name[: cut + 1]: None}
    # Small pages, so that clients have to turn them.
    size = min(int(query.get("maxResults", "5")), 5)
    left = [name for name in found if name > query.get("pageToken", "")]
    page = {"kind": "storage#objects", "items": [], "prefixes": []}
    for name in left[:size]:
      if (value := found[name]) is None:
        page["prefixes"].append(name)
      else:
        page["items"].append(resource(bucket, name, value))
    if left[size:]:
      page["nextPageToken"] = left[size - 1]
    return page

  def check_writable(self, bucket: str) -> None:
    """Refuses where nothing may be changed."""
    self.objects(bucket)
    if bucket in self.read_only:
      raise Refusal(403, f"caller may not change {bucket}")

  def _check_generation(self, found, query):
    generation = "0" if found is None else str(found.generation)
    if query.get("ifGenerationMatch", generation) != generation:
      raise Refusal(412, "conditionNotMet")
    if query.get("ifGenerationNotMatch") == generation and found is not None:
      raise Refusal(304, "notModified")


def resource(bucket: str, name: str, value: Object) -> dict:
  """What the interface says of an object."""
  return {
    "kind": "storage#object",
    "bucket": bucket,
    "name": name,
    "size": str(len(value.content)),
    "generation": str(value.generation),
    "metageneration": "1",
    "timeCreated": _UPDATED,
    "updated": _UPDATED,
    "etag": str(value.generation),
  }


class _Server(http.server.ThreadingHTTPServer):
  def handle_error(self, request, client_address):
    # gcsfs asks for the file and for the folder of a name at once, and hangs up
    # on the slower answer.
    if not isinstance(sys.exception(), ConnectionError):
      super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
  emulator: Emulator
  protocol_version = "HTTP/1.1"

  def log_message(self, format, *args):
    pass

  def _handle(self):
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    path = url.path.removeprefix("/download")
    try:
      self._route(path, query, body)
    except Refusal as refusal:
      error = {"code": refusal.status, "message": str(refusal)}
      self._answer_json({"error": error}, refusal.status)

  do_GET = do_POST = do_PUT = do_DELETE = _handle

  def _route(self, path, query, body):
    emulator, unquote = self.emulator, urllib.parse.unquote
    kind = query.get("uploadType")
    if (match := _UPLOAD.fullmatch(path)) and "upload_id" in query:
      self._continue_upload(query["upload_id"], body)
    elif match and kind == "resumable":
      self._start_upload(match["bucket"], query)
    elif match and kind == "media":
      done = emulator.put(match["bucket"], query["name"], body, query)
      self._answer_json(done)
    elif match := _OBJECT.fullmatch(path):
      bucket, name = match["bucket"], unquote(match["name"])
      if self.command == "DELETE":
        emulator.delete(bucket, name, query)
        self._answer(204, b"")
        return
      value = emulator.get(bucket, name, query)
      if query.get("alt") == "media":
        self._answer_content(value)
      else:
        self._answer_json(resource(bucket, name, value))
    elif (match := _BUCKET.fullmatch(path)) and self.command == "GET":
      if match["is_list"]:
        self._answer_json(emulator.list(match["bucket"], query))
      else:
        name = match["bucket"]
        emulator.objects(name)
        if name in emulator.without_metadata:
          raise Refusal(403, f"caller may not ask about {name}")
        self._answer_json({"kind": "storage#bucket", "name": name, "id": name})
    else:
      raise Refusal(400, f"the emulator has no {self.command} {self.path}")

  def _start_upload(self, bucket, query):
    # Refused at once, and not when all has been sent.
    self.emulator.check_writable(bucket)
    upload_id = str(next(self.emulator.counter))
    self.emulator.uploads[upload_id] = bucket, query, bytearray()
    path = urllib.parse.urlsplit(self.path).path
    location = f"{self.emulator.url}{path}?upload_id={upload_id}"
    self._answer(200, b"", Location=location)

  def _continue_upload(self, upload_id, body):
    bucket, query, content = self.emulator.uploads[upload_id]
    content.extend(body)
    total = self.headers.get("Content-Range", "/*").split("/")[1]
    if total == "*" or len(content) < int(total):
      self._answer(308, b"", Range=f"bytes=0-{len(content) - 1}")
      return
    del self.emulator.uploads[upload_id]
    self._answer_json(self.emulator.put(bucket, query["name"], content, query))

  def _answer_content(self, value):
    headers = {"X-Goog-Generation": str(value.generation)}
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
    size = len(value.content)
    if wanted is None:
      self._answer(200, value.content, **headers)
      return
    first, last = wanted.groups()
    if first:
      start, stop = int(first), min(int(last) + 1 if last else size, size)
    else:
      start, stop = max(size - int(last), 0), size
    if start >= size:
      raise Refusal(416, "The requested range cannot be satisfied.")
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    self._answer(206, value.content[start:stop], **headers)

  def _answer_json(self, value, status=200):
    content = json.dumps(value).encode() if status != 304 else b""
    self._answer(status, content, **{"Content-Type": "application/json"})

  def _answer(self, status, content, **headers):
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name, value)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    self.wfile.write(content)
