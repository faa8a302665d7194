"""``kubeai load``: downloads model weights."""

# No postponed annotations: typer evaluates those of the command.
import asyncio
from pathlib import Path
from typing import Annotated

import typer


def load(
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL", help="hf://<owner>/<name>, or s3://, gs://, oss://<bucket>/<path>."
        ),
    ],
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Target directory; replaced if it exists.")
    ],
    parallel: Annotated[
        int,
        typer.Option(help="Number of parts (Hugging Face: files) to fetch at a time.", min=1),
    ] = 8,
) -> None:
    """Download model weights into a directory, all or nothing. Rerun to resume.

    Reads $HF_TOKEN and $HF_ENDPOINT; $AWS_ACCESS_KEY_ID, $AWS_SECRET_ACCESS_KEY, $AWS_REGION
    and $AWS_ENDPOINT_URL; $GOOGLE_APPLICATION_CREDENTIALS; $OSS_ACCESS_KEY_ID,
    $OSS_ACCESS_KEY_SECRET and $OSS_REGION.
    """
    from kubeai.loading import load as download

    asyncio.run(download(url, folder, parallel=parallel))
