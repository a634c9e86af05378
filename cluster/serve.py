"""An HTTP endpoint that explains an uploaded image, on Ray Serve.

    serve run cluster.serve:app run=/data/runs/vgg16 methods=patternnet,patternattribution
    curl --data-binary @cat.jpg 'http://127.0.0.1:8000/explain'
    curl --data-binary @cat.jpg 'http://127.0.0.1:8000/explain?picture=patternattribution' > map.png

Needs the extra `serve`. Like Ray itself it has no access control of its own: put it behind what you trust.
"""

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve import Application

from patterns import UserError
from patterns.attribution import picture, png
from ray_jobs.jobs.explain.online import OnlineExplainer
from ray_jobs.runs.map_files import beside
from ray_jobs.units import byte_count

MAX_BYTES = 16 << 20  # of an upload
MAX_BATCH = 8
BATCH_WAIT = 0.02  # seconds that an image waits for others to share its pass
MAX_QUEUED = 64  # requests; beyond, a client is told to come again

api = FastAPI(title="patternnet-ray")


@dataclass(frozen=True)
class Explained:
    """What is said of one image. arrays: by method, float16; the map is array · 2^exponents."""

    said: dict[str, Any]
    arrays: dict[str, np.ndarray]
    exponents: dict[str, Any]


def drawn(method: str, array: np.ndarray) -> bytes:
    return png(picture(method, beside(array)))


def as_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


@serve.deployment(max_ongoing_requests=4 * MAX_BATCH, max_queued_requests=MAX_QUEUED)
@serve.ingress(api)
class Endpoint:
    """Explains images that come one by one, those that come together in one pass."""

    def __init__(self, max_bytes: int, arguments: dict[str, Any]) -> None:
        self.max_bytes = max_bytes
        self.explainer = OnlineExplainer(**arguments)
        self.names = self.explainer.names

    @api.get("/health")
    def health(self) -> dict[str, Any]:
        """What this endpoint does, once it is ready to."""
        return {"methods": self.explainer.methods, "max_bytes": self.max_bytes}

    @api.post("/explain")
    async def explain(self, request: Request, picture: str | None = None) -> Response:
        """Explain the image that is the body: JSON with a PNG and an NPY file for each method, or one method's PNG.

        413 for a body that is too large, 422 for one that is no image that can be used or an unknown method.
        """
        if picture is not None and picture not in self.explainer.methods:
            raise HTTPException(422, f"no method {picture!r}; there are {', '.join(self.explainer.methods)}")
        found = await self.batched(await self.body(request))
        if isinstance(found, str):
            raise HTTPException(422, found)
        if picture is not None:
            return Response(drawn(picture, found.arrays[picture]), media_type="image/png")
        maps = {
            method: {
                "png": base64.b64encode(drawn(method, array)).decode(),
                "npy": base64.b64encode(as_npy(array)).decode(),
                "exponent": found.exponents[method],
            }
            for method, array in found.arrays.items()
        }
        name = self.names.get(found.said["prediction"])
        return JSONResponse({**found.said, "name": name, "maps": maps})

    async def body(self, request: Request) -> bytes:
        """The body, of which no more than is allowed is ever held."""
        content = bytearray()
        async for piece in request.stream():
            content += piece
            if len(content) > self.max_bytes:
                raise HTTPException(413, f"more than {self.max_bytes} bytes")
        return bytes(content)

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=BATCH_WAIT)
    async def batched(self, images: list[bytes]) -> list[Explained | str]:
        """What is said of each image, or why it cannot be used."""
        inputs, reasons = self.explainer.inputs(images)
        results: list[Explained | str] = list(reasons)
        if len(inputs):
            explained = self.explainer.explain(inputs, ["0"] * len(inputs))
            used = (place for place, reason in enumerate(reasons) if not reason)
            for number, place in enumerate(used):
                said = {k: v for k, v in explained.rows[number].items() if k != "label"}
                arrays = {method: a[number] for method, a in explained.arrays.items()}
                exponents = {method: e[number].tolist() for method, e in explained.exponents.items()}
                results[place] = Explained(said, arrays, exponents)
        return results


def app(arguments: dict[str, str]) -> Application:
    """The application, of arguments as `serve run` gives them.

    run: the folder or URL of a finished fit.  methods, estimator: comma-separated.  target, classes, weights: as for
    `patternnet explain`.  max_bytes: of an upload: 16M.  gpus, replicas: of each replica, and how many.
    UserError for others.
    """
    known = {"run", "methods", "estimator", "target", "classes", "weights", "max_bytes", "gpus", "replicas"}
    if unknown := sorted(arguments.keys() - known):
        raise UserError(unknown[0], "no argument of this application", f"There are {', '.join(sorted(known))}.")
    if "run" not in arguments:
        raise UserError("run", "is missing", "Write run=FOLDER, a finished fit's.")
    listed = {k: tuple(arguments[k].split(",")) for k in ("methods", "estimator") if k in arguments}
    plain: dict[str, Any] = {k: arguments[k] for k in ("run", "target", "classes", "weights") if k in arguments}
    endpoint = Endpoint.options(  # type: ignore[attr-defined]
        num_replicas=int(arguments.get("replicas", 1)),
        ray_actor_options={"num_gpus": float(arguments.get("gpus", 0))},
    )
    return endpoint.bind(byte_count(arguments.get("max_bytes", str(MAX_BYTES))), plain | listed)
