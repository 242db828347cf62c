"""Options of a server: what its clients may ask for."""

from __future__ import annotations

from dataclasses import dataclass

from abyssal.errors import UsageError


@dataclass(frozen=True)
class ServerOptions:
    """The name under which the model is served, who may use it, and how much of it.

    `api_keys` open everything below /v1; none opens it to everybody. `max_waiting` texts wait behind those that the
    engine runs, `max_texts` are the most of one request (`n` times its prompts). `max_prompt_tokens` is the longest
    prompt, none leaves what the model can attend to. A body has at most `max_body_bytes` and arrives within
    `body_timeout_s`. After SIGTERM requests under way have `drain_timeout_s` to end.

    Raises:
        UsageError: a value that cannot be.
    """

    model_name: str = "model"
    api_keys: tuple[str, ...] = ()
    max_waiting: int = 256
    max_texts: int = 128
    max_prompt_tokens: int | None = None
    max_body_bytes: int = 4 * 2**20
    body_timeout_s: float = 60.0
    drain_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        """Check every field."""
        minimum: dict[str, float] = {"max_waiting": 0, "max_texts": 1, "max_body_bytes": 1, "max_prompt_tokens": 1}
        minimum |= {"body_timeout_s": 0, "drain_timeout_s": 0}
        for field, bound in minimum.items():
            value = getattr(self, field)
            if value is not None and not value >= bound:
                raise UsageError(f"{field}={value}: must be at least {bound}")
        if not self.model_name:
            raise UsageError("model_name='': must not be empty; clients ask for the model by it")
        if not all(self.api_keys):
            raise UsageError("api_keys: one of them is empty; an empty key would let everybody in")
