"""An emulator of Google Cloud Storage that also keeps generations, as tensorstore needs them.

    python bucket_server.py PORT

It has one bucket, "bucket", in memory.
"""

import sys
import threading
from http import HTTPStatus

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

LOCK = threading.RLock()  # that what is compared is what is replaced


def generation(storage, bucket: str, name: str) -> str:
    """Return the generation of an object, "0" where there is none."""
    try:
        return str(storage.get_file_obj(bucket, name)["generation"])
    except NotFound:
        return "0"


def conditional(handler):
    """Return the handler of a request with the conditions that the emulator leaves out."""

    def handle(request, response, storage, *args, **kwargs):
        name = request.params.get("object_id") or request.query.get("name", [None])[0]
        with LOCK:
            now = generation(storage, request.params["bucket_name"], name) if name else "0"
            if request.query.get("ifGenerationMatch", [now])[0] != now:
                response.status = HTTPStatus.PRECONDITION_FAILED
                return
            if request.query.get("ifGenerationNotMatch", [None])[0] == now != "0":
                response.status = HTTPStatus.NOT_MODIFIED
                return
            handler(request, response, storage, *args, **kwargs)
            if now != "0":
                response["x-goog-generation"] = now

    return handle


for method in ("insert", "get", "download", "delete"):
    setattr(objects, method, conditional(getattr(objects, method)))

if __name__ == "__main__":
    from gcp_storage_emulator.server import create_server  # its table holds the handlers

    create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
