"""Every setting of the trainer with its default, range and meaning, as one frozen value.

It does not know where values come from (files, environment, flags): `config` reads them.
"""

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

GSM8K_PROMPT = '{question} Let\'s think step by step and output the final answer after "####".'
BIASED = "anything else cuts the sampled distribution, and the importance ratio would be biased"

DataFormat = Literal["gsm8k", "dapo_math", "aime", "prompts"]


def _as_tuple(value: Any) -> Any:
    """`a,b` from an environment variable and `["a", "b"]` from TOML both become a tuple."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


def _checked_urls(urls: tuple[str, ...]) -> tuple[str, ...]:
    if not urls:
        raise ValueError("must name at least one replica")
    urls = tuple(url.rstrip("/") for url in urls)
    if bad := [url for url in urls if not url.startswith(("http://", "https://"))]:
        raise ValueError(f"every entry must start with http:// or https://, got {bad[0]!r}")
    if len(set(urls)) < len(urls):
        raise ValueError(f"names a replica twice, got {', '.join(urls)}")
    return urls


def _checked_discover(url: str) -> str:
    if url and not (url.startswith("http://") and urlsplit(url).hostname):
        raise ValueError(f"must be http://NAME:PORT (addresses have no certificates), got {url!r}")
    return url.rstrip("/")


class Section(BaseModel):
    """Unknown keys, strings where numbers belong, NaN and infinity are refused in every section."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RunSettings(Section):
    """The run: its folder, length, seed and when to stop."""

    name: str = Field("", pattern=r"^(\w[\w.+-]*)?$", description="Folder under `dir`; empty: recipe name and time")
    dir: str = Field("runs", min_length=1, description="Folder that holds the runs")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of sampling and of torch")
    steps: int = Field(0, ge=0, description="Training steps; 0: until `epochs` are over")
    epochs: int = Field(20, ge=1, description="Passes over the training data; the limit when `steps` is 0")
    wandb: Literal["auto", "online", "offline", "off"] = Field(
        "auto", description="Weights & Biases; auto: online when WANDB_API_KEY is set, offline when not"
    )
    wandb_project: str = Field("flashrl", min_length=1, description="Project name in Weights & Biases")
    samples_logged: int = Field(4, ge=0, description="Completions written to samples.jsonl each step")
    stop_accuracy: float = Field(0.0, ge=0, le=1, description="Stop once eval/accuracy reaches this; 0: never")
    stop_min_versions: int = Field(
        0, ge=0, description="Weight versions that must be out before `stop_accuracy` counts"
    )
    threads: int = Field(0, ge=0, description="torch CPU threads; 0: torch's default")
    metrics_port: int = Field(
        0, ge=0, le=65535, description="Prometheus can read the last row at /metrics here; 0: off"
    )
    metrics_host: str = Field("127.0.0.1", min_length=1, description="Address of `metrics_port`")


class ModelSettings(Section):
    """The trained model."""

    path: str = Field(min_length=1, description="Hugging Face id or folder")
    compute_dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Forward and backward; master weights and optimizer state are float32 always"
    )
    activation_checkpointing: bool = Field(False, description="Recompute activations: less memory, a third more work")
    compile: bool = Field(
        False, description="Compile blocks and log-probs with torch.compile: minutes at the start, on a GPU"
    )
    hsdp_replicas: int = Field(
        1, ge=1, description="Copies of the model, each sharded over an equal part of the ranks; 1: over all of them"
    )
    logprob_chunk_tokens: int = Field(1024, ge=1, description="Rows of the logits that exist at once in float32")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA when there is one")


class DataSettings(Section):
    """Prompts and rewards."""

    train: str = Field(min_length=1, description="Hub id, or a local .jsonl or .parquet file")
    eval: str = Field("", description="The same, for evaluation; needed unless `eval.every` is 0")
    train_split: str = Field("train", min_length=1, description="Split of the hub data set to train on")
    eval_split: str = Field("test", min_length=1, description="Split of the hub data set to evaluate on")
    hub_config: str = Field("main", description="Configuration name on the hub, for both; empty: the only one")
    format: DataFormat = Field("gsm8k", description="Columns of the rows; see prompts.py")
    eval_format: Literal["", "gsm8k", "dapo_math", "aime", "prompts"] = Field("", description="Empty: as `format`")
    prompt_template: str = Field(
        GSM8K_PROMPT, description="Text around `{question}`; format `prompts` brings its own and leaves this unused"
    )
    chat_template: bool = Field(True, description="Send the prompt as a user message through the chat template")
    max_prompt_tokens: int = Field(512, ge=1, description="Longer prompts are skipped and reported")
    shuffle_seed: int = Field(0, ge=0, description="Order of the training rows; every epoch has its own")
    reward: str = Field("numeric", min_length=1, description="Name of a reward, or `package.module:function`")
    reward_timeout_s: float = Field(
        10.0, gt=0, description="Limit for one call of `package.module:function`, which runs in processes of its own"
    )
    reward_max_failures: int = Field(
        32, ge=0, description="Failures of it in a row (error, too slow, no finite number) that end the run; 0: none"
    )

    @model_validator(mode="after")
    def _check(self) -> "DataSettings":
        if "{question}" not in self.prompt_template:
            raise ValueError("data.prompt_template: must contain {question}")
        return self


class RolloutSettings(Section):
    """The rollout service's replicas."""

    urls: Annotated[tuple[str, ...], BeforeValidator(_as_tuple), AfterValidator(_checked_urls)] = Field(
        ("http://127.0.0.1:8000",), description="One URL a replica; commas between them in a variable"
    )
    discover: Annotated[str, AfterValidator(_checked_discover)] = Field(
        "", description="http://NAME:PORT, instead of `urls`: a replica at each address of NAME, looked up all the time"
    )
    token_file: str = Field("", description="File with the API token; FLASHRL_TOKEN goes before it")
    keys_dir: str = Field("", description="Folder with CURVE keys for the weights; empty: loopback only")
    quantization: Literal["int8", "fp8", "none"] = Field("int8", description="What the service was started with")
    request_timeout_s: float = Field(600.0, gt=0, description="Limit for one /generate request")
    connect_deadline_s: float = Field(
        300.0,
        gt=0,
        description="How long to wait for the replicas at the start, and later while none of them is in use",
    )


class SamplingSettings(Section):
    """What is sampled in a step, and dynamic sampling."""

    prompts_per_step: int = Field(1024, ge=1, description="Groups of unequal rewards wanted in a step")
    samples_per_prompt: int = Field(5, ge=2, description="Completions in a group")
    temperature: float = Field(1.0, ge=0.01, le=2, description="The trainer's logits are divided by it too")
    top_p: float = Field(1.0, description="Must be 1")
    top_k: int = Field(-1, description="Must be -1")
    min_p: float = Field(0.0, description="Must be 0")
    max_tokens: int = Field(1024, ge=1, description="Limit of a response")
    max_attempts: int = Field(30, ge=1, description="Rounds of sampling before a step goes on with what it has")
    dynamic: bool = Field(
        True, description="Learn from groups of unequal rewards only, and sample until there are enough; false: GRPO"
    )
    keep_surplus: bool = Field(True, description="Carry groups beyond `prompts_per_step` into the next step")
    surplus_max_age: int = Field(
        1, ge=0, description="Weight versions a carried group may lag behind; the importance weights correct for it"
    )

    @model_validator(mode="after")
    def _check(self) -> "SamplingSettings":
        for name, needed in (("top_p", 1), ("top_k", -1), ("min_p", 0)):
            if getattr(self, name) != needed:
                raise ValueError(f"sampling.{name}: must be {needed}, got {getattr(self, name)}: {BIASED}")
        return self


class AlgorithmSettings(Section):
    """DAPO and the correction for the sampler's quantization."""

    clip_low: float = Field(0.2, gt=0, lt=1, description="The ratio is clipped below 1 - clip_low")
    clip_high: float = Field(0.28, gt=0, description="The ratio is clipped above 1 + clip_high")
    dual_clip: float = Field(10.0, gt=1, description="Loss limit, in advantages, where the advantage is negative")
    correction: Literal["token", "sequence", "geometric", "icepop", "none"] = Field(
        "token", description="Importance correction between sampler and trainer; token: truncated importance sampling"
    )
    proximal: Literal["trainer", "rollout"] = Field(
        "trainer",
        description="Whose log-probs the ratio is clipped around; rollout: where a step makes one update only",
    )
    tis_cap: float = Field(2.0, ge=1, description="Cap of the importance weight; 8 for long reasoning")
    mask_low: float = Field(0.5, gt=0, le=1, description="Ratios below are masked (geometric, icepop)")
    mask_high: float = Field(2.0, ge=1, description="Ratios above are masked (geometric, icepop)")
    overlong: Literal["soft", "filter", "none"] = Field(
        "soft", description="soft: penalty near the limit; filter: truncated samples leave the loss"
    )
    overlong_buffer: int = Field(512, ge=1, description="Tokens before the limit over which the penalty grows")
    overlong_factor: float = Field(1.0, ge=0, description="The penalty at the limit")
    filtered_in_group_mean: bool = Field(True, description="Filtered samples still count in their group's mean")
    max_staleness: int = Field(
        0,
        ge=0,
        description="Steps that sampling may run ahead of training; 0: they take turns",
    )
    update_epochs: int = Field(1, ge=1, description="Passes over a step's samples")

    @model_validator(mode="after")
    def _check(self) -> "AlgorithmSettings":
        if self.mask_low >= self.mask_high:
            raise ValueError(f"algorithm.mask_low: must be below mask_high = {self.mask_high}, got {self.mask_low}")
        if self.proximal == "rollout" and self.correction not in ("geometric", "none"):
            raise ValueError(
                "algorithm.proximal: rollout puts the mismatch into the clipped ratio, where a weight would count it "
                f"twice: algorithm.correction must be none or geometric, got {self.correction}"
            )
        return self


class OptimSettings(Section):
    """AdamW and batch sizes."""

    lr: float = Field(1e-6, ge=0, description="Learning rate, constant after the warm-up")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's decoupled weight decay")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the mean")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's decay of the variance")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm")
    max_skipped_steps: int = Field(
        3, ge=1, description="Optimizer steps in a row without a finite loss and gradient, after which a run stops"
    )
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rate rises linearly")
    mini_batch_prompts: int = Field(256, ge=1, description="Groups in one optimizer step")
    max_tokens_per_micro_batch: int = Field(16384, ge=1, description="Packed tokens in one forward, on each rank")


class SyncSettings(Section):
    """Weight updates."""

    chunk_mib: int = Field(2, ge=1, le=4, description="Size of a chunk on the wire")
    transfer_deadline_s: float = Field(
        120.0, gt=0, description="A transfer that does not get on, or a commit that takes, so long has failed"
    )
    straggler_s: float = Field(
        10.0,
        gt=0,
        description="How long after the first replica the others may commit; a later one catches up by itself",
    )
    ring_mib: int = Field(
        256, ge=0, description="Deltas kept for replicas that missed some, encoded; beyond, they get a snapshot"
    )


class EvalSettings(Section):
    """Evaluation through the service."""

    every: int = Field(5, ge=0, description="Steps between evaluations, with one before and after; 0: never")
    problems: int = Field(0, ge=0, description="The first so many problems; 0: all")
    samples_per_problem: int = Field(1, ge=1, description="Samples averaged in eval/accuracy, at temperature 1")
    greedy: bool = Field(True, description="Also one greedy answer each: eval/greedy")
    max_tokens: int = Field(0, ge=0, description="Limit of a response; 0: as `sampling.max_tokens`")
    bf16_batch: int = Field(64, ge=1, description="Sequences that `eval --bf16` generates at a time")


class CheckpointSettings(Section):
    """Checkpoints."""

    every: int = Field(10, ge=0, description="Steps between checkpoints; 0: only at the end and at an interrupt")
    keep: int = Field(2, ge=1, description="Checkpoints kept; older ones are deleted")
    export: bool = Field(True, description="Write a safetensors folder at the end")


class TrainerConfig(Section):
    """All settings; `config.load_config` makes one."""

    run: RunSettings = RunSettings()
    model: ModelSettings
    data: DataSettings
    rollout: RolloutSettings = RolloutSettings()
    sampling: SamplingSettings = SamplingSettings()
    algorithm: AlgorithmSettings = AlgorithmSettings()
    optim: OptimSettings = OptimSettings()
    sync: SyncSettings = SyncSettings()
    eval: EvalSettings = EvalSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()

    @model_validator(mode="after")
    def _check(self) -> "TrainerConfig":
        response, buffer = self.sampling.max_tokens, self.algorithm.overlong_buffer
        if self.algorithm.overlong == "soft" and buffer >= response:
            raise ValueError(f"algorithm.overlong_buffer: must be < sampling.max_tokens = {response}, got {buffer}")
        prompts, mini_batch = self.sampling.prompts_per_step, self.optim.mini_batch_prompts
        if mini_batch > prompts:
            raise ValueError(
                f"optim.mini_batch_prompts: must be <= sampling.prompts_per_step = {prompts}, got {mini_batch}"
            )
        if self.algorithm.proximal == "rollout" and (mini_batch < prompts or self.algorithm.update_epochs > 1):
            raise ValueError(
                "algorithm.proximal: rollout needs steps of one update: optim.mini_batch_prompts = "
                f"sampling.prompts_per_step = {prompts} and algorithm.update_epochs = 1, got {mini_batch} and "
                f"{self.algorithm.update_epochs}"
            )
        longest, budget = self.data.max_prompt_tokens + response, self.optim.max_tokens_per_micro_batch
        if longest > budget:
            raise ValueError(
                "optim.max_tokens_per_micro_batch: must hold one sequence of data.max_prompt_tokens + "
                f"sampling.max_tokens = {longest}, got {budget}"
            )
        if self.eval.every and not self.data.eval:
            raise ValueError(f"data.eval: needed because eval.every = {self.eval.every} (eval.every = 0 goes without)")
        if self.run.stop_accuracy and not self.eval.every:
            raise ValueError("run.stop_accuracy: needs evaluations, but eval.every = 0")
        return self
