"""Vectors of texts: the mean of the model's final states over a text's tokens, of length 1."""

import asyncio
import base64
import threading
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bincompress.inference.generate import GenerationSettings, room_after
from bincompress.inference.request_fields import Fields
from bincompress.serving.asking import check_model
from bincompress.serving.bodies import in_thread, read_json
from bincompress.serving.openai_asking import texts_of
from bincompress.serving.reading import RequestError
from bincompress.serving.service import Service
from bincompress.serving.texts import of_request, while_connected

_PIECE = 32  # tokens between which texts that are being written get their turn


async def embeddings(request: Request) -> Response:
    """Answer POST /v1/embeddings."""
    service: Service = of_request(request)
    service.ready()
    fields = await read_json(request, service)
    texts, packed = await in_thread(service, _asked, fields, service)
    gone = threading.Event()

    async def compute() -> list[Any]:
        async with service.embedding:  # one at a time, so that a client which asks for many holds up no other
            return [await in_thread(service, _vector, service, ids, gone) for ids in texts]

    try:
        async with asyncio.timeout(service.settings.request_seconds):
            vectors = await while_connected(request.receive, compute())
    except TimeoutError:
        raise RequestError(504, "not finished within its time; ask for fewer or shorter texts") from None
    finally:
        gone.set()
    data = [
        {"object": "embedding", "index": index, "embedding": _packed(vector) if packed else vector.tolist()}
        for index, vector in enumerate(vectors)
    ]
    read = sum(len(ids) for ids in texts)
    usage = {"prompt_tokens": read, "total_tokens": read}
    return JSONResponse({"object": "list", "model": service.settings.model_name, "data": data, "usage": usage})


def _asked(fields: Fields, service: Service) -> tuple[list[list[int]], bool]:
    check_model(fields, service)
    texts = [ids for ids, _ in texts_of(fields, service, "input")]
    form = fields.take("encoding_format", str)
    if form not in (None, "float", "base64"):
        fields.refuse("encoding_format", f"expected float or base64, found {form!r:.40}")
    fields.neutral("dimensions", service.model.decoder.config.hidden)
    fields.take("user", str)
    fields.finish()
    settings = GenerationSettings(context=service.ready().limits.context)
    for ids in texts:
        room_after(ids, settings, service.model.decoder)
    return texts, form == "base64"


def _vector(service: Service, ids: list[int], gone: threading.Event) -> Any:
    """Return the mean of the states of a text's tokens, (hidden,) float32 of length 1."""
    decoder = service.model.decoder
    cache = decoder.new_cache(len(ids), service.model.defaults.cache)
    total = np.zeros(decoder.config.hidden)
    piece = min(_PIECE, decoder.tokens_alike or _PIECE)
    for start in range(0, len(ids), piece):
        if gone.is_set():
            break
        states = decoder.states_of_all([(ids[start : start + piece], cache)])
        if not np.isfinite(states).all():
            raise RequestError(500, "the model computes NaN or infinity for this text")
        total += states.sum(axis=0, dtype=np.float64)
    return (total / max(float(np.linalg.norm(total)), 1e-30)).astype(np.float32)


def _packed(vector: Any) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
