"""The System One API: typed questions about a state, answered with probabilities."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec
from typing_extensions import override

from kubeai.mock_engine.formats.base import PROMPTS_MAX, ApiError, Meta, encode
from kubeai.mock_engine.formats.computed import ComputedRequest, length
from kubeai.simulation import text

TYPES = ("choice", "noul", "score")


class Question(msgspec.Struct):
    """One question. ``criteria``: named options of a choice, levels of a score."""

    type: str
    instructions: Any = ""
    criteria: Any = None

    def answer(self, state: str) -> dict[str, Any]:
        """Options are as probable as their texts are similar to the state."""
        if self.type == "noul":
            return {"type": "noul", "noul": _weight(state, str(self.instructions)) / 2}
        names = [str(each) for each in self.criteria or ()]
        if self.type not in TYPES or not names:
            types = ", ".join(TYPES)
            raise ApiError(f"questions: each needs criteria, and a type among {types}")
        described = self.criteria.values() if isinstance(self.criteria, dict) else names
        weights = [
            _weight(state, f"{name} {description or ''}")
            for name, description in zip(names, described, strict=True)
        ]
        shares = [weight / sum(weights) for weight in weights]
        confidence = max(shares)
        if self.type == "choice":
            return {
                "type": "choice",
                "choice": names[shares.index(confidence)],
                "probabilities": dict(zip(names, shares, strict=True)),
                "confidence": confidence,
            }
        return {
            "type": "score",
            "score": sum(level * share for level, share in enumerate(shares)),
            "legend": {str(level): name for level, name in enumerate(names)},
            "probabilities": {str(level): share for level, share in enumerate(shares)},
            "confidence": confidence,
        }


def _weight(state: str, option: str) -> float:
    """From 0.02 to 2."""
    return 1.02 + 0.98 * text.similarity(text.embed(state), text.embed(option))


class DecisionRequest(ComputedRequest, kw_only=True):
    """The supported fields of ``POST /v1/systemone``."""

    prefix: ClassVar[str] = "systemone-"
    state: Any
    questions: Annotated[dict[str, Question], msgspec.Meta(min_length=1, max_length=PROMPTS_MAX)]
    instructions: str | None = None

    @property
    def _state(self) -> str:
        state = self.state if isinstance(self.state, str) else encode(self.state).decode()
        return f"{state} {self.instructions or ''}"

    @override
    def lengths(self) -> list[int]:
        state = length(self._state)
        return [state + length(str(each.instructions)) for each in self.questions.values()]

    @override
    def response(self, meta: Meta, tokens: int) -> dict[str, Any]:
        answers = {name: each.answer(self._state) for name, each in self.questions.items()}
        return {
            "id": meta.id,
            "object": "structured_decision",
            "created": meta.created,
            "model": meta.model,
            "answers": answers,
            "usage": {"input_tokens": tokens, "output_tokens": len(answers)},
            "diagnostics": {name: {"label_mass": 1.0, "argmax_is_label": True} for name in answers},
        }
