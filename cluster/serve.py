"""An HTTP endpoint that explains an uploaded image, on Ray Serve.

    serve run cluster.serve:app run=/data/runs/vgg16 methods=patternnet,patternattribution
    curl --data-binary @cat.jpg 'http://127.0.0.1:8000/explain'
    curl --data-binary @cat.jpg 'http://127.0.0.1:8000/explain?picture=patternattribution' > map.png

Needs the extra `serve`. Like Ray itself it has no access control: put it behind a proxy that has.
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
from patterns.attribution import encode_png, render_map
from ray_jobs.jobs.explain.online import OnlineExplainer
from ray_jobs.runs.map_files import tile_targets
from ray_jobs.units import parse_bytes

MAX_BYTES = 16 << 20  # maximum size of an upload
MAX_BATCH = 8
BATCH_WAIT = 0.02  # seconds that an image waits for others of the same batch
MAX_QUEUED = 64  # maximum number of waiting requests; further clients get status 503

api = FastAPI(title="patternnet-ray")


@dataclass(frozen=True)
class Explained:
    """The result for one image.

    Attributes:
        row: Prediction, probability and the other columns of explanations.parquet.
        arrays: For each method a float16 array; the map is array · 2^exponent.
        exponents: The exponents by method.
    """

    row: dict[str, Any]
    arrays: dict[str, np.ndarray]
    exponents: dict[str, Any]


def map_png(method: str, array: np.ndarray) -> bytes:
    """Return a map as a PNG file."""
    return encode_png(render_map(method, tile_targets(array)))


def map_npy(array: np.ndarray) -> bytes:
    """Return a map as an NPY file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


@serve.deployment(max_ongoing_requests=4 * MAX_BATCH, max_queued_requests=MAX_QUEUED)
@serve.ingress(api)
class Endpoint:
    """Endpoint that explains single images; images that arrive together share a batch."""

    def __init__(self, max_bytes: int, arguments: dict[str, Any]) -> None:
        self.max_bytes = max_bytes
        self.explainer = OnlineExplainer(**arguments)
        self.names = self.explainer.names

    @api.get("/health")
    def health(self) -> dict[str, Any]:
        """Return the methods and the maximum upload size; answers once the endpoint is ready."""
        return {"methods": self.explainer.methods, "max_bytes": self.max_bytes}

    @api.post("/explain")
    async def explain(self, request: Request, picture: str | None = None) -> Response:
        """Explain the image in the body of the request.

        Args:
            request: The request; its body is an image file.
            picture: A method; None for all methods.

        Returns:
            JSON with a PNG and an NPY file for each method, or the PNG of one method.

        Raises:
            HTTPException: 413 if the body is too large, 422 if the image cannot be used or the method is unknown.
        """
        if picture is not None and picture not in self.explainer.methods:
            raise HTTPException(422, f"no method {picture!r}; there are {', '.join(self.explainer.methods)}")
        found = await self.explain_batch(await self.body(request))
        if isinstance(found, str):
            raise HTTPException(422, found)
        if picture is not None:
            return Response(map_png(picture, found.arrays[picture]), media_type="image/png")
        maps = {
            method: {
                "png": base64.b64encode(map_png(method, array)).decode(),
                "npy": base64.b64encode(map_npy(array)).decode(),
                "exponent": found.exponents[method],
            }
            for method, array in found.arrays.items()
        }
        name = self.names.get(found.row["prediction"])
        return JSONResponse({**found.row, "name": name, "maps": maps})

    async def body(self, request: Request) -> bytes:
        """Return the body; at most `max_bytes` and one chunk are held in memory."""
        content = bytearray()
        async for piece in request.stream():
            content += piece
            if len(content) > self.max_bytes:
                raise HTTPException(413, f"more than {self.max_bytes} bytes")
        return bytes(content)

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=BATCH_WAIT)
    async def explain_batch(self, images: list[bytes]) -> list[Explained | str]:
        """Return for each image its explanation, or the reason why it cannot be used."""
        inputs, reasons = self.explainer.decode_images(images)
        results: list[Explained | str] = list(reasons)
        if len(inputs):
            explained = self.explainer.explain(inputs, ["0"] * len(inputs))
            used = (index for index, reason in enumerate(reasons) if not reason)
            for number, index in enumerate(used):
                row = {k: v for k, v in explained.rows[number].items() if k != "label"}
                arrays = {method: a[number] for method, a in explained.arrays.items()}
                exponents = {method: e[number].tolist() for method, e in explained.exponents.items()}
                results[index] = Explained(row, arrays, exponents)
        return results


def app(arguments: dict[str, str]) -> Application:
    """Build the application from the arguments of `serve run`.

    Args:
        arguments: `run`: folder or URL of a finished fit. `methods`, `estimator`: comma-separated. `target`,
            `classes`, `weights`: as for `patternnet explain`. `max_bytes`: maximum upload size, for example 16M.
            `gpus`: GPUs of each replica. `replicas`: number of replicas.

    Raises:
        UserError: If an argument is unknown, or `run` is missing.
    """
    known = {"run", "methods", "estimator", "target", "classes", "weights", "max_bytes", "gpus", "replicas"}
    if unknown := sorted(arguments.keys() - known):
        raise UserError(unknown[0], "unknown argument", f"The arguments are {', '.join(sorted(known))}.")
    if "run" not in arguments:
        raise UserError("run", "this argument is missing", "Pass run=FOLDER with the folder of a finished fit.")
    listed = {k: tuple(arguments[k].split(",")) for k in ("methods", "estimator") if k in arguments}
    plain: dict[str, Any] = {k: arguments[k] for k in ("run", "target", "classes", "weights") if k in arguments}
    endpoint = Endpoint.options(  # type: ignore[attr-defined]
        num_replicas=int(arguments.get("replicas", 1)),
        ray_actor_options={"num_gpus": float(arguments.get("gpus", 0))},
    )
    return endpoint.bind(parse_bytes(arguments.get("max_bytes", str(MAX_BYTES))), plain | listed)
