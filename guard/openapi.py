"""The interface as an OpenAPI 3.1 document."""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import guard

_REFERENCE = "#/components/schemas/{model}"

_ERRORS = {
    "400": "The body is not what its headers say, or came too slowly.",
    "413": "Too many bytes or too many pixels.",
    "415": "Not a PNG, JPEG, WebP or BMP image, or not the type it was declared as.",
    "422": "No image, several images, or one that is empty, damaged, animated or too long and thin.",
    "429": "More uploads at once than the server takes.",
    "500": "A mistake of the server.",
    "503": "Not ready.",
    "504": "No answer in time.",
}


class ErrorDetail(BaseModel):
    """What went wrong: a code for programs, a sentence for people."""

    code: str
    message: str


class ErrorAnswer(BaseModel):
    """Every error, from every route."""

    error: ErrorDetail
    request_id: str


def document(answer: type[BaseModel], model: type[BaseModel]) -> dict[str, Any]:
    """The document; `answer` is what `/classify` returns, `model` what `/model` returns."""
    kinds = (answer, model, ErrorAnswer)
    _, schemas = models_json_schema([(kind, "serialization") for kind in kinds], ref_template=_REFERENCE)
    image = {"type": "string", "format": "binary"}
    form = {"type": "object", "required": ["image"], "properties": {"image": image}}
    raw = {f"image/{name}": {"schema": image} for name in ("png", "jpeg", "webp", "bmp")}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "guard",
            "version": guard.__version__,
            "description": "Image classification with adversarial detection and radii.",
        },
        "paths": {
            "/classify": {
                "post": {
                    "summary": "Classify one image, and say whether to trust the answer",
                    "operationId": "classify",
                    "requestBody": {
                        "required": True,
                        "content": {"multipart/form-data": {"schema": form}, **raw},
                    },
                    "responses": {
                        "200": _json("The decision; a rejection is a normal answer.", answer),
                        **{status: _json(text, ErrorAnswer) for status, text in _ERRORS.items()},
                    },
                }
            },
            "/model": {
                "get": {
                    "summary": "The model, its detector and its radii",
                    "operationId": "model",
                    "responses": {
                        "200": _json("What is served.", model),
                        "503": _json(_ERRORS["503"], ErrorAnswer),
                    },
                }
            },
            "/livez": {"get": _probe("Is the process alive?", "livez")},
            "/readyz": {"get": _probe("Has the model been loaded, verified and warmed up?", "readyz")},
            "/metrics": {
                "get": {
                    "summary": "Prometheus metrics",
                    "operationId": "metrics",
                    "responses": {
                        "200": {"description": "Prometheus' text format.", "content": {"text/plain": {}}}
                    },
                }
            },
        },
        "components": {"schemas": schemas["$defs"]},
    }


def _json(description: str, kind: type[BaseModel]) -> dict[str, Any]:
    schema = {"$ref": _REFERENCE.format(model=kind.__name__)}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _probe(summary: str, name: str) -> dict[str, Any]:
    responses = {"200": {"description": "Yes."}, "503": _json("No.", ErrorAnswer)}
    return {"summary": summary, "operationId": name, "responses": responses}
