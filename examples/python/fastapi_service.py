"""An HTTP service that calls Gramophone.

    pip install fastapi uvicorn python-multipart
    python examples/python/fastapi_service.py                    # http://127.0.0.1:8000/docs

    curl -F photo=@photo.jpg -F painting=@painting.jpg -F size=512 127.0.0.1:8000/stylize -o out.png
    curl -F photo=@photo.jpg -F painting=@painting.jpg -N 127.0.0.1:8000/stylize/events

Both stop their job when the HTTP client leaves. Needs a server (`make serve`).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import math
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Annotated, TypeVar

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Form, Request, Response, UploadFile
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from gramophone_client import (
    Accepted,
    AsyncGramophoneClient,
    AsyncJobStream,
    CallCancelledError,
    ConnectionFailedError,
    DeadlineExceededError,
    ExhaustedError,
    Frame,
    FrameOptions,
    GramophoneError,
    InvalidRequestError,
    MessageTooLargeError,
    Progress,
    Result,
    Update,
)

T = TypeVar("T")
router = APIRouter()

# The first class that fits. Every other GramophoneError is a defect of the server, or of this program.
STATUS_CODES: list[tuple[type[GramophoneError], int]] = [
    (InvalidRequestError, 422),
    (MessageTooLargeError, 413),
    (ExhaustedError, 503),
    (ConnectionFailedError, 503),
    (DeadlineExceededError, 504),
    (CallCancelledError, 409),  # another client has cancelled the job
    (GramophoneError, 502),
]


def make_app(server: str) -> FastAPI:
    """The application. One client serves all requests: its connection carries any number of calls."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        async with AsyncGramophoneClient(server) as client:
            app.state.client = client
            yield

    app = FastAPI(title="Paint photos", lifespan=lifespan)
    app.add_exception_handler(GramophoneError, answer_error)
    app.include_router(router)
    return app


async def answer_error(_: Request, error: Exception) -> JSONResponse:
    """The HTTP response for an error of Gramophone."""
    assert isinstance(error, GramophoneError)
    code = next(code for kind, code in STATUS_CODES if isinstance(error, kind))
    headers = {} if error.retry_after_s is None else {"Retry-After": str(math.ceil(error.retry_after_s))}
    return JSONResponse(described(error), code, headers)


def described(error: GramophoneError) -> dict[str, object]:
    """An error as JSON."""
    fields = [{"field": field, "description": description} for field, description in error.violations]
    return {"error": str(error), "reason": error.reason, "fields": fields}


def client_of(request: Request) -> AsyncGramophoneClient:
    """The client of the application."""
    client: AsyncGramophoneClient = request.app.state.client
    return client


Client = Annotated[AsyncGramophoneClient, Depends(client_of)]
Size = Annotated[int, Form(description="longest side in pixels")]


@router.post("/stylize", response_class=Response)
async def stylize(
    request: Request, client: Client, photo: UploadFile, painting: UploadFile, size: Size = 512
) -> Response:
    """Answers with the finished picture, a PNG."""
    images = await photo.read(), await painting.read()
    stylized = await while_connected(request, client.stylize(*images, size=size))
    if stylized is None:
        return Response(status_code=499)  # for the log: nobody receives it
    return Response(stylized.picture.data, media_type="image/png")


async def while_connected(request: Request, work: Coroutine[object, object, T]) -> T | None:
    """The result of `work`; None if the HTTP client leaves before, which cancels it. Frameworks do that for streams
    alone."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


async def started_job(
    client: Client, photo: UploadFile, painting: UploadFile, size: Size = 512
) -> AsyncIterator[AsyncJobStream]:
    """A job for the time of a request: a refusal comes before the first byte of the response, and the job is stopped
    after the last one."""
    images, frames = (await photo.read(), await painting.read()), FrameOptions(max_side=360)
    async with client.stream(*images, size=size, frames=frames) as updates:
        yield updates


@router.post("/stylize/events", response_class=EventSourceResponse)
async def stylize_events(
    updates: Annotated[AsyncJobStream, Depends(started_job)],
) -> AsyncIterator[ServerSentEvent]:
    """Streams the job as server-sent events: accepted, progress, frame (a JPEG in base64), and at the end result (a PNG
    in base64) or error."""
    try:
        async for update in updates:
            if event := as_event(update):
                yield event
    except GramophoneError as error:  # too late for an HTTP status
        yield ServerSentEvent(event="error", data=described(error))


def as_event(update: Update) -> ServerSentEvent | None:
    """The event for an update; None for those that a browser does not need."""
    match update:
        case Accepted():
            return ServerSentEvent(event="accepted", data={"job_id": update.job_id, "iterations": update.iterations})
        case Progress():
            data = {"iteration": update.iteration, "loss": update.losses.total, "time_left_s": update.time_left_s}
            return ServerSentEvent(event="progress", data=data)
        case Frame():
            return ServerSentEvent(
                event="frame", data={"iteration": update.iteration, "jpeg": text(update.picture.data)}
            )
        case Result():
            return ServerSentEvent(
                event="result", data={"iterations": update.iterations, "png": text(update.picture.data)}
            )
        case _:
            return None


def text(data: bytes) -> str:
    """Bytes as text for JSON."""
    return base64.b64encode(data).decode()


def main() -> None:
    """Serves the application."""
    parser = argparse.ArgumentParser(description="Serve Gramophone over HTTP.")
    parser.add_argument("--port", type=int, default=8000, help="(default: 8000)")
    parser.add_argument("--server", default="127.0.0.1:50051", help="of Gramophone (default: 127.0.0.1:50051)")
    args = parser.parse_args()
    uvicorn.run(make_app(args.server), port=args.port)


if __name__ == "__main__":
    main()
