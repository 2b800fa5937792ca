"""Sample images of a bundle, for its page: `samples/samples.json` beside the pictures it names.

[{"file": "cat.png", "title": "cat", "note": "CIFAR-10 test image 0", "kind": "clean"}, ...]
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from guard.errors import BundleError

FOLDER = "samples"
INDEX = "samples.json"


class Sample(BaseModel):
    """One picture: its file in the samples folder, a short title, one sentence, and what was done to it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*\.png$", max_length=100)]
    title: Annotated[str, Field(max_length=60)]
    note: Annotated[str, Field(max_length=300)] = ""
    kind: Literal["clean", "adversarial"] = "clean"


_SAMPLES = TypeAdapter(list[Sample])


def load(bundle: Path) -> list[Sample]:
    """The samples of the bundle in folder `bundle`; none where it has no index.

    Raises `BundleError` where the index is not what it should be, or names a file that is not there.
    """
    index = bundle / FOLDER / INDEX
    if not index.is_file():
        return []
    try:
        samples = _SAMPLES.validate_json(index.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise BundleError(f"{index}: {where}: {first['msg']}. Correct it or remove the file.") from error
    for sample in samples:
        if not (index.parent / sample.file).is_file():
            raise BundleError(f"{index}: names {sample.file}, which is not beside it.")
    return samples


def dump(samples: list[Sample]) -> bytes:
    """The index as the bytes of its file."""
    return _SAMPLES.dump_json(samples, indent=1) + b"\n"
