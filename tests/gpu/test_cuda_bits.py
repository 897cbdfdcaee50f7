"""The stored form and its digest have the same bits on CUDA as on the CPU; packed attention and log-probs agree."""

import pytest
import torch
from torch import Tensor, nn

from flashrl_rollout import addressed
from flashrl_rollout.background import Background
from flashrl_rollout.runtime_map import Axis, Held, Region, RuntimePart, patterns_of
from flashrl_rollout.runtime_weights import RuntimeWeights
from flashrl_trainer.attention import packed_attention
from flashrl_trainer.batch import TrainingSample, pack
from flashrl_trainer.logprobs import token_logprobs
from flashrl_wire.delta import Change, diff, equal_bits
from flashrl_wire.digest import digest_at, digest_range
from flashrl_wire.layout import PartSpec
from flashrl_wire.quantize import RowStorage, quantize_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def awkward_matrix(rows: int, columns: int) -> Tensor:
    """Random rows over twelve decades, and rows of zeros, subnormals and the largest bf16."""
    generator = torch.Generator().manual_seed(rows)
    scale = 10.0 ** torch.linspace(-6, 6, rows)[:, None]
    weight = torch.randn(rows, columns, generator=generator) * scale
    weight[0], weight[1], weight[2] = 0.0, 9.2e-41, 3.3e38
    weight[3] = -0.0
    return weight.bfloat16()


@pytest.mark.parametrize("storage", ["int8_rows", "fp8_rows"])
def test_quantized_bits_are_those_of_the_cpu(storage: RowStorage) -> None:
    weight = awkward_matrix(3000, 1111)
    on_cpu, on_cuda = quantize_rows(weight, storage), quantize_rows(weight.cuda(), storage)
    for left, right in zip(on_cpu, on_cuda, strict=True):
        assert equal_bits(left, right.cpu())


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_digests_and_diffs_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    old = awkward_matrix(999, 501).float().clamp(-100, 100).to(dtype)
    new = old.clone()
    new.view(torch.uint8).view(-1)[::977] += 1
    assert digest_range(old, 12345) == digest_range(old.cuda(), 12345)
    where = torch.arange(0, old.numel(), 7)
    assert digest_at(where, old.view(-1)[where]) == digest_at(where.cuda(), old.view(-1)[where].cuda())
    on_cpu, on_cuda = diff("w", old, new, 11), diff("w", old.cuda(), new.cuda(), 11)
    assert on_cpu is not None
    assert on_cuda is not None
    assert on_cpu[1] == on_cuda[1]
    assert on_cpu[0].indices is not None
    assert on_cuda[0].indices is not None
    assert torch.equal(on_cpu[0].indices, on_cuda[0].indices.cpu())


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize(("on_cuda", "limit"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-4)])
def test_packed_attention_with_gradients_agrees_with_fp32_on_the_cpu(
    window: int | None, shares: bool, on_cuda: torch.dtype, limit: float
) -> None:
    """With and without prompts that samples share, whose rows CUDA gathers anew for each of them."""
    torch.manual_seed(7)
    lengths = (75, 91, 131, 64)
    batch = pack([TrainingSample([1] * n, 40, [0.0] * (n - 40), [], 1.0, True, 0 if shares else None) for n in lengths])
    tokens = len(batch.token_ids)
    assert tokens == sum(lengths) - shares * 3 * 40
    states = [torch.randn(1, heads, tokens, 64) for heads in (14, 2, 2)]
    results = []
    for device, dtype in (("cpu", torch.float32), ("cuda", on_cuda)):
        inputs = [s.detach().clone().to(device, dtype).requires_grad_() for s in states]
        moved = batch.to(device)
        out, _ = packed_attention(
            nn.Identity(),
            *inputs,
            None,
            cu_seq_lens_q=moved.cu_seqlens,
            max_length_q=moved.max_sample_tokens,
            document_rows=moved.rows,
            document_kept=moved.kept,
            sliding_window=window,
        )
        out.float().square().sum().backward()
        results.append([out, *(i.grad for i in inputs)])
    for expected, found in zip(*results, strict=True):
        error = (found.cpu().float() - expected).norm() / expected.norm()
        assert error < limit


def test_chunked_log_probs_in_bf16_are_close_to_fp32() -> None:
    torch.manual_seed(8)
    hidden, head = torch.randn(300, 256).bfloat16(), torch.randn(5000, 256).bfloat16() * 0.1
    targets = torch.randint(0, 5000, (300,))
    exact = torch.log_softmax(hidden.double() @ head.double().t(), dim=1).gather(1, targets[:, None]).squeeze(1)
    inputs = [hidden.cuda().requires_grad_(), head.cuda().requires_grad_()]
    found, _ = token_logprobs(inputs[0], inputs[1], targets.cuda(), 1.0, 128)
    # products of bf16 inputs with fp32 sums: nothing is rounded to bf16 on the way
    torch.testing.assert_close(found.double().cpu(), exact, atol=2e-4, rtol=0)
    found.sum().backward()
    assert inputs[1].grad is not None
    assert inputs[1].grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_elements_all_over_the_device_are_written_and_read_by_address(dtype: torch.dtype) -> None:
    tensors = [torch.zeros(n, dtype=dtype, device="cuda") for n in (5000, 1, 333)]
    where = [
        torch.arange(1, n, 3, device="cuda") if n > 1 else torch.zeros(1, dtype=torch.long).cuda()
        for n in (5000, 1, 333)
    ]
    values = [torch.randint(0, 100, w.shape, device="cuda").to(dtype) for w in where]
    addresses = torch.cat([t.data_ptr() + w * t.element_size() for t, w in zip(tensors, where, strict=True)])
    expected = [t.scatter(0, w, v) for t, w, v in zip(tensors, where, values, strict=True)]
    addressed.scatter(addresses, torch.cat(values))
    assert all(torch.equal(found, wanted) for found, wanted in zip(tensors, expected, strict=True))
    assert torch.equal(addressed.gather(addresses, torch.cat(values)), torch.cat(values))
    addressed.scatter(addresses[:0], values[0][:0])


def _weights(device: str) -> tuple[RuntimeWeights, list[Tensor]]:
    """Two fused layers of two parts each, in bf16 and int8."""
    memories = [
        torch.zeros(600, dtype=torch.bfloat16, device=device),
        torch.zeros(800, dtype=torch.int8, device=device),
    ]
    parts = {}
    for memory, dtype in zip(memories, ("bf16", "int8"), strict=True):
        half = memory.numel() // 2
        for number in (0, 1):
            spec = PartSpec(name=f"{dtype}.{number}", dtype=dtype, shape=(half, 1))  # type: ignore[arg-type]
            region = Region.of(0, number * half, iter([Axis(half, 1, 1)]))
            parts[spec.name] = RuntimePart(spec, (Held(region, patterns_of(memory)),))
    return RuntimeWeights(parts, lambda _: None), memories


@pytest.mark.parametrize("ahead_bytes", [0, 1 << 20])
def test_updates_on_cuda_are_those_of_the_cpu_and_are_taken_back(ahead_bytes: int) -> None:
    """Prepared beside the caller's stream, or written at once."""
    generator = torch.Generator().manual_seed(1)
    changes = [
        Change("bf16.0", torch.randn(90, generator=generator).bfloat16(), torch.arange(0, 270, 3)),
        Change("bf16.1", torch.randn(300, generator=generator).bfloat16()),
        Change(
            "int8.1", torch.randint(-127, 128, (50,), generator=generator).to(torch.int8), torch.arange(7, 407, 8)[:50]
        ),
        Change("int8.0", torch.randint(-127, 128, (4,), generator=generator).to(torch.int8), start=396),
    ]
    on_cpu, on_cuda = _weights("cpu"), _weights("cuda")
    prepared = Background(torch.device("cuda:0")).start(lambda: on_cuda[0].prepare(changes, ahead_bytes)).result()
    assert (prepared.ready != []) == bool(ahead_bytes)
    assert not any(memory.any() for memory in on_cuda[1])
    assert on_cuda[0].write(prepared) == on_cpu[0].write(changes)
    for found, expected in zip(on_cuda[1], on_cpu[1], strict=True):
        assert equal_bits(found.cpu(), expected)
    on_cuda[0].revert()
    assert not any(memory.any() for memory in on_cuda[1])
