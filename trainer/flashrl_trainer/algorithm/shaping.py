"""What happens to responses that are too long. Lengths are those of the response: the prompt is not known here."""

from torch import Tensor


def soft_overlong_penalty(response_tokens: Tensor, max_response_tokens: int, buffer: int, factor: float) -> Tensor:
    """Punishment [S] float32, to be added to the reward: 0 up to `max_response_tokens - buffer`, -factor at the limit.

    response_tokens [S] int64, in tokens; linear within the last `buffer` tokens (DAPO, arXiv 2503.14476, eq. 13).
    Raises ValueError unless 1 <= buffer <= max_response_tokens.
    """
    if not 1 <= buffer <= max_response_tokens:
        raise ValueError(f"overlong_buffer: {buffer} is not within 1 and max_response_tokens = {max_response_tokens}")
    into_buffer = (response_tokens - (max_response_tokens - buffer)).float() / buffer
    return -factor * into_buffer.clamp(0.0, 1.0)


def overlong_filter(truncated: Tensor, stays_in_group: bool) -> tuple[Tensor, Tensor]:
    """Masks `(in_loss, counts_in_group)`, [S] bool, for samples that the response limit cut (`truncated` [S] bool).

    A truncated sample always leaves the loss. With `stays_in_group` its reward still moves the group's mean and
    deviation (the others are judged against it); without, they are those of the finished samples alone
    (`advantage.group_advantages`).
    """
    in_loss = ~truncated
    return in_loss, (in_loss | truncated) if stays_in_group else in_loss
