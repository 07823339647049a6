"""`fastvlm serve`: the verb."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from fastvlm_mlx.cli.common import Model, option, resolve
from fastvlm_mlx.cli.options import ComputeUnits, Crop, EncoderCompute, ImageSize

ADDRESS, ACCESS, LIMITS = "Address", "Access", "Limits"
# As the server has it, whose import takes longer than all of the help.
MAX_PIXELS = 50_000_000
KEY_VARIABLE = "FASTVLM_API_KEY"


def serve(
    call: typer.Context,
    model: Model,
    host: Annotated[
        str,
        option(
            "The address to listen on; any but this machine's own needs a key.",
            group=ADDRESS,
            value="HOST",
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, option("The port to listen on; 0 takes a free one.", group=ADDRESS, value="N")
    ] = 8080,
    name: Annotated[
        str | None,
        option(
            "What clients call the model.",
            group=ADDRESS,
            value="NAME",
            default="the directory's name",
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        option(
            f"The key that clients must send. Other users of this machine can read options: set "
            f"{KEY_VARIABLE} instead.",
            group=ACCESS,
            value="KEY",
            default=f"{KEY_VARIABLE}, or none",
        ),
    ] = None,
    allow_url: Annotated[
        list[str] | None,
        option(
            "Fetch images from this host, over http and https, if its address is public.",
            group=ACCESS,
            value="HOST",
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        option("Let web pages of this origin use the server.", group=ACCESS, value="ORIGIN"),
    ] = None,
    batch_size: Annotated[
        int, option("Decode so many answers together.", group=LIMITS, value="N")
    ] = 16,
    queue: Annotated[
        int,
        option("Let so many more wait; whoever comes then gets 429.", group=LIMITS, value="N"),
    ] = 64,
    max_tokens: Annotated[
        int,
        option("The limit of an answer, also where a request sets none.", group=LIMITS, value="N"),
    ] = 2048,
    max_images: Annotated[
        int, option("The most images in a request.", group=LIMITS, value="N")
    ] = 16,
    max_body: Annotated[
        int, option("The most bytes in a request.", group=LIMITS, value="BYTES")
    ] = 32_000_000,
    max_image_bytes: Annotated[
        int, option("The most bytes of an image that is fetched.", group=LIMITS, value="BYTES")
    ] = 16_000_000,
    max_pixels: Annotated[
        int, option("Refuse an image that has more pixels.", group=LIMITS, value="N")
    ] = MAX_PIXELS,
    connections: Annotated[
        int, option("Keep so many connections open at once.", group=LIMITS, value="N")
    ] = 512,
    client_timeout: Annotated[
        float,
        option(
            "Wait so long for a client to send its request, or to read its answer on.",
            group=LIMITS,
            value="SECONDS",
        ),
    ] = 30.0,
    fetch_timeout: Annotated[
        float, option("Wait so long for an image's address.", group=LIMITS, value="SECONDS")
    ] = 10.0,
    shutdown_timeout: Annotated[
        float,
        option(
            "After Ctrl-C, give answers so long to come to their end.",
            group=LIMITS,
            value="SECONDS",
        ),
    ] = 30.0,
    compute_units: ComputeUnits = "auto",
    encoder_compute: EncoderCompute = "auto",
    image_size: ImageSize = None,
    crop: Crop = False,
) -> None:
    """Clients of OpenAI's API use it with http://HOST:PORT/v1 as their base URL. Its address goes
    to standard output, and a line for each request to standard error. Ctrl-C ends it when the
    answers on their way have come."""
    from fastvlm_mlx.loading import load
    from fastvlm_mlx.serve.limits import Settings
    from fastvlm_mlx.serve.server import listen, server, service, url

    settings = Settings(
        host=host,
        port=port,
        api_key=os.environ.get(KEY_VARIABLE) if api_key is None else api_key,
        allow_url=tuple(allow_url or ()),
        allow_origin=tuple(allow_origin or ()),
        batch_size=batch_size,
        queue=queue,
        connections=connections,
        max_body=max_body,
        max_image_bytes=max_image_bytes,
        max_images=max_images,
        max_tokens=max_tokens,
        client_timeout=client_timeout,
        fetch_timeout=fetch_timeout,
        shutdown_timeout=shutdown_timeout,
    )
    listening = listen(settings)
    bundle = resolve(call, model)
    loaded = load(
        bundle,
        compute_units=compute_units,
        image_size=image_size,
        crop=crop,
        max_pixels=max_pixels,
        encoder_compute=encoder_compute,
    )
    # What it lacks is to be known now, and the first client not to wait for it.
    _ = loaded.encoder
    served = service(loaded, name or Path(model).resolve().name, settings)
    running = server(served)
    print(f"{served.name} at {url(listening)}/v1 (Ctrl-C ends it)", flush=True)
    signal.signal(signal.SIGTERM, _end)
    try:
        # uvicorn catches both signals, lets answers end, and hands the signal on.
        running.run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    finally:
        served.schedule.close()
    print("stopped", file=sys.stderr)


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
