"""Everything around a training loop: processes, optimizers, weight averages, checkpoints, records."""

import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    patch_environment,
    send_to_device,
    set_seed,
)
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from tqdm import tqdm

from stablesr_kit import storage
from stablesr_kit.errors import CheckpointError, ConfigError, DivergenceError, OutputError
from stablesr_kit.training.data.batches import SampleDraws, Share, SharedBatches, make_loader
from stablesr_kit.training.run.config import RunConfig
from stablesr_kit.training.run.networks import SavedPart, TrainedNetwork, prepare_for_fsdp, save_network
from stablesr_kit.training.run.optimizers import build_optimizer, learning_rate_schedule
from stablesr_kit.training.run.reporting import (
    StepRecords,
    find_trackers,
    model_card,
    open_repository,
    show_pictures,
    start_trackers,
    upload,
)
from stablesr_kit.training.run.state import (
    OPTIONS,
    RESUMES,
    changed_options,
    checkpoint_folder,
    find_checkpoint,
    prune,
    publish,
    seconds_of,
    step_of,
    writing,
)
from stablesr_kit.training.run.validation import Example, Measure, Restore, Validation, ValidationOptions
from stablesr_kit.training.run.zero import SHARED_STATES, ZeroOptimizer, clip_shares, resting_groups, zero_stage

logger = logging.getLogger(__name__)


class LogFile(logging.FileHandler):
    """A log file; the run ends with OutputError if it cannot be written."""

    def handleError(self, _record: logging.LogRecord) -> None:
        """Raise OutputError instead of the current error."""
        error = sys.exc_info()[1]
        assert error is not None  # logging calls this in an except block
        raise storage.unwritable(Path(self.baseFilename), error, RESUMES) from error


class TrainingRun:
    """A run of `config.max_train_steps` steps that resumes by itself.

    First `train` every network; then loop over `batches`, with `backward` and `update`; at the end `finish`::

        run = TrainingRun(config)
        network = run.train(network, {"vae": ""})
        for draws, image in run.batches(crops):
            loss = ...
            run.backward(loss)
            run.update(pixel=loss)
        run.finish({"vae": run.averaged("vae")})

    some_rest: whether some trained parameters get no gradient in some steps.

    Attributes:
        accelerator: its `autocast()` has the chosen precision.
        step: number of optimizer steps done.
    """

    def __init__(self, config: RunConfig, *, some_rest: bool = False) -> None:
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.some_rest = some_rest
        gpu = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.precision = config.precision_on(gpu or torch.device("cpu"))
        self.zero_stage = zero_stage(self.precision)
        with patch_environment(ACCELERATE_USE_DEEPSPEED="false"):  # zero.py does it instead
            self.accelerator = Accelerator(
                cpu=gpu is None,  # explicitly, so that several processes can communicate on the CPU
                mixed_precision=self.precision,
                # as a plugin: otherwise environment variables, which accelerate's configs set, would override it
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps),
                log_with=find_trackers(config.report_to) or None,
                project_config=ProjectConfiguration(config.output_dir, logging_dir=str(self.output_dir / "logs")),
                kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=some_rest)],
            )
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not self.accelerator.is_fsdp2:
            raise ConfigError(
                f"FSDP is asked for, and accelerate gives {self.accelerator.distributed_type.value} here; "
                "it takes GPUs, and fsdp_version: 2 as in configs/accelerate/fsdp.yaml"
            )
        self.step = 0
        self.networks: list[TrainedNetwork] = []
        self.validation: Validation | None = None
        self.accelerator.register_save_state_pre_hook(self._save_networks)
        self.accelerator.register_load_state_pre_hook(self._load_networks)
        with writing(self.output_dir):
            self.output_dir.mkdir(parents=True, exist_ok=True)
            if self.accelerator.is_main_process:
                config.save(self.output_dir / "config.yaml")
                logging.basicConfig(
                    level=logging.INFO,
                    format="%(asctime)s %(name)s: %(message)s",
                    handlers=[logging.StreamHandler(), LogFile(self.output_dir / "log.txt")],
                )
        self.repository = open_repository(config) if config.push_to_hub and self.is_main else None
        self.seconds = 0.0  # of earlier calls
        if config.allow_tf32:  # torch's default is TF32 for convolutions only
            torch.backends.cuda.matmul.allow_tf32 = True
        set_seed(config.seed)

    @property
    def samples_per_step(self) -> int:
        """Samples per optimizer step, over all processes and accumulated batches."""
        batches = self.config.gradient_accumulation_steps * self.accelerator.num_processes
        return self.config.train_batch_size * batches

    @property
    def share(self) -> Share:
        """How samples are distributed over the processes."""
        return Share(self.config.train_batch_size, self.accelerator.num_processes)

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Precision for the weights of frozen networks."""
        return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.precision, torch.float32)

    @property
    def is_first_batch_of_step(self) -> bool:
        """Whether the coming batch is the first one of an optimizer step."""
        return not self.losses

    def train(
        self,
        network: nn.Module,
        parts: Mapping[str, str],
        *,
        only_trained: bool = False,
        learning_rate: float | None = None,
        betas: tuple[float, float] | None = None,
        weight_decay: float | None = None,
        is_clipped: bool = True,
        average: bool = True,
    ) -> nn.Module:
        """The network for the loop to call; its parameters that require gradients are trained.

        Call the returned network itself, never a submodule: gradients are averaged, and sharded parameters gathered, in
        its forward only.

        parts: what checkpoints hold, folder name -> name of the submodule, "" for the network itself. only_trained:
        save only trained weights. learning_rate: a constant one; None takes the schedule of the options. betas,
        weight_decay: None takes the options' values. is_clipped: whether max_grad_norm applies. average: whether a
        moving average is kept.
        """
        config = self.config
        peak = config.learning_rate * (self.samples_per_step if config.scale_lr else 1)
        schedule = learning_rate_schedule(config, peak) if learning_rate is None else lambda _: float(learning_rate)
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        groups = resting_groups(network) if self.zero_stage is not None and self.some_rest else trained
        optimizer = build_optimizer(config, groups, betas=betas, weight_decay=weight_decay)
        if self.accelerator.is_fsdp2:
            prepare_for_fsdp(network, self.accelerator)
        saved = [SavedPart.of(network, name, path, only_trained=only_trained) for name, path in parts.items()]
        if self.zero_stage is None:
            prepared, stepped = self.accelerator.prepare(network, optimizer)
        else:
            prepared = self.accelerator.prepare_model(network, evaluation_mode=True)  # autocast, but no DDP
            stepped = ZeroOptimizer(prepared, optimizer, self.zero_stage, self.accelerator)
        self.networks.append(
            TrainedNetwork(
                parts=saved,
                prepared=prepared,
                optimizer=stepped,
                learning_rate=schedule,
                is_clipped=is_clipped,
                ema=None,
            )
        )
        if average and config.ema_decay > 0:
            # of the prepared parameters, which may be this process's shards
            foreach = not self.accelerator.is_fsdp2  # its tensors do not support it
            ema = EMAModel(self.networks[-1].parameters(), decay=config.ema_decay, foreach=foreach)
            ema.to(self.accelerator.device)
            self.networks[-1].ema = ema
        logger.info("%d trained parameters in %s", sum(p.numel() for p in trained), ", ".join(parts))
        return prepared

    def validate(
        self,
        options: ValidationOptions,
        part: str | Sequence[str],
        examples: Sequence[Example],
        restore: Restore,
        measure: Measure,
    ) -> None:
        """Make and measure validation pictures with averaged weights, as often as the options say.

        Arguments as `Validation`. The main process makes them, the others wait. Training's random numbers stay the
        same.
        """
        if options.validation_steps:
            self.validation = Validation(self.output_dir, options, part, examples, restore, measure)

    def batches(self, dataset: Dataset[Any]) -> Iterator[tuple[SampleDraws, Any]]:
        """All remaining batches, with the random numbers of their samples; resumes the run first.

        Item i of the dataset must depend on its seed and i only.
        """
        self._resume()
        accelerator, config = self.accelerator, self.config
        accumulated = config.gradient_accumulation_steps
        indices = SharedBatches(
            config.train_batch_size,
            self.step * accumulated,
            config.max_train_steps * accumulated,
            accelerator.num_processes,
            accelerator.process_index,
        )
        self.records = StepRecords(self.output_dir / "losses.jsonl", self.step) if self.is_main else None
        if self.validation is not None and self.is_main:
            self.validation.resume(self.step)
        start_trackers(accelerator, config, self.step)
        self.losses: list[dict[str, Tensor]] = []
        self.start = self.step_start = time.monotonic()
        if self.step == 0:
            self._show()  # fails now rather than in the middle of the training
        self.progress = tqdm(
            total=config.max_train_steps * self.samples_per_step,
            initial=self.step * self.samples_per_step,
            unit="sample",
            mininterval=5,
            disable=not accelerator.is_local_main_process,
        )
        with self.progress:
            for numbers, batch in make_loader(dataset, indices, config.dataloader_num_workers):
                for network in self.networks:
                    for group in network.optimizer.param_groups:
                        group["lr"] = network.learning_rate(self.step)
                with accelerator.accumulate(*(network.prepared for network in self.networks)):
                    draws = SampleDraws(config.seed, numbers, self.samples_per_step)
                    yield draws, send_to_device(batch, accelerator.device)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, the mean over the batch."""
        self.accelerator.backward(loss)
        for optimizer in self._zero_optimizers():
            optimizer.take_in()

    def update(self, **losses: Tensor) -> None:
        """End a batch. At the end of an optimizer step: step every network, record losses, validate and save if due.

        losses: scalar tensors by name; their mean over the samples of the step, in all processes, is recorded. Raises
        DivergenceError if a loss or a gradient is not finite; the networks are then as before the step.
        """
        self.losses.append({name: loss.detach().float() for name, loss in losses.items()})
        if not self.accelerator.sync_gradients:
            return
        values = self._mean_losses()
        norm = self._clip_gradients()
        has_scaler = self.accelerator.scaler is not None  # it skips steps with infinite gradients
        if not all(map(math.isfinite, values.values())) or not (has_scaler or math.isfinite(norm)):
            self._stop_diverged(values)

        for network in self.networks:
            network.optimizer.step()
            network.optimizer.zero_grad()
            if network.ema is not None:
                network.ema.step(network.parameters())
        rate = self.networks[0].learning_rate(self.step)
        self.step += 1
        self._record(values, rate)
        self._show()  # before the checkpoint: a resumed run does not repeat it
        if self.step % self.config.checkpointing_steps == 0 or self.step == self.config.max_train_steps:
            self.save()

    def save(self) -> None:
        """Write output_dir/checkpoint-STEP atomically, and delete checkpoints beyond the limit.

        The oldest is deleted before writing, to free space, unless it is the only one.
        """
        limit = self.config.checkpoints_total_limit
        if self.is_main and limit is not None:
            prune(self.output_dir, max(limit - 1, 1))
        self._write_state(checkpoint_folder(self.output_dir, self.step))
        if self.is_main and limit is not None:
            prune(self.output_dir, limit)

    def averaged(self, name: str) -> Any:
        """A copy of the part saved as `name`, with averaged weights if they are kept; None outside the main process.

        Every process must call it. The copy is in float32, on the device of the run.
        """
        network = next(net for net in self.networks if any(part.name == name for part in net.parts))
        copied = network.averaged(name, self.accelerator)
        return None if copied is None else copied.to(self.accelerator.device).eval()

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write the results (folder name -> network) and a model card to output_dir, and upload them if asked to.

        Only the main process writes. Raises OutputError.
        """
        if self.is_main:
            for name, network in results.items():
                save_network(network, self.output_dir / name)
            card = model_card(
                self.config,
                {name: type(network).__name__ for name, network in results.items()},
                processes=self.accelerator.num_processes,
                samples=self.samples_per_step,
                seconds=self._seconds(),
            )
            with writing(self.output_dir / "README.md"):
                card.save(self.output_dir / "README.md")
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if self.repository is not None:
            message = f"{Path(self.config.output_dir).resolve().name} after {self.step} steps"
            logger.info("uploaded to %s", upload(self.output_dir, self.repository, message))

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, which writes."""
        return bool(self.accelerator.is_main_process)

    def _seconds(self) -> float:
        """Duration of the run, over all calls, without what was lost to interruptions."""
        return self.seconds + time.monotonic() - self.start

    def _resume(self) -> None:
        folder = find_checkpoint(self.output_dir, self.config.resume_from_checkpoint)
        if folder is None:
            return
        if self.zero_stage is None and any(folder.glob(SHARED_STATES)):
            raise CheckpointError(
                f"{folder} was written by DeepSpeed; resume it with configs/accelerate/deepspeed.yaml and as many "
                "processes, or give another output_dir"
            )
        if changed := changed_options(self.config, folder / OPTIONS):
            logger.warning("%s was written with other options: %s", folder, "; ".join(changed))
        self.step, self.seconds = step_of(folder), seconds_of(folder)
        self.accelerator.load_state(str(folder))
        self.accelerator.step = 0  # checkpoints lie between optimizer steps
        logger.info("resumed %s of %d steps", folder, self.config.max_train_steps)

    def _write_state(self, folder: Path) -> None:
        """Write the whole state to a folder, atomically; every process must call it."""
        part = storage.part_of(folder)
        try:
            with writing(folder):
                self.accelerator.save_state(str(part))
                self.accelerator.wait_for_everyone()
                if self.is_main:
                    self.config.save(part / OPTIONS)
                    publish(part, folder, self.step, self._seconds())
        except OutputError:
            shutil.rmtree(part, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()

    def _save_networks(self, _models: list[nn.Module], weights: list[Any], folder: str) -> None:
        for network in self.networks:
            network.save(Path(folder), self.accelerator)
        weights.clear()  # accelerate would write them as well

    def _load_networks(self, models: list[nn.Module], folder: str) -> None:
        for network in self.networks:
            network.load(Path(folder), self.step)
        models.clear()

    def _zero_optimizers(self) -> list[ZeroOptimizer]:
        return [network.optimizer for network in self.networks if isinstance(network.optimizer, ZeroOptimizer)]

    def _clip_gradients(self) -> float:
        """Clip the gradients, of all networks with is_clipped together, to max_grad_norm; returns the norm before."""
        clipped = [network for network in self.networks if network.is_clipped]
        if self.zero_stage is not None:
            for optimizer in self._zero_optimizers():
                optimizer.finish()
            shared = [network.optimizer for network in clipped if isinstance(network.optimizer, ZeroOptimizer)]
            return clip_shares(shared, self.config.max_grad_norm, self.accelerator)
        parameters = [parameter for network in clipped for parameter in network.parameters()]
        norm = self.accelerator.clip_grad_norm_(parameters, self.config.max_grad_norm)
        if isinstance(norm, DTensor):  # each process has a share
            norm = norm.full_tensor()
        return float(norm)

    def _mean_losses(self) -> dict[str, float]:
        """Mean of each loss over accumulated batches and processes."""
        names = list(self.losses[0])
        local = torch.stack([torch.stack([losses[name] for name in names]) for losses in self.losses]).mean(dim=0)
        self.losses = []
        return dict(zip(names, self.accelerator.reduce(local, reduction="mean").tolist(), strict=True))

    def _record(self, values: dict[str, float], rate: float) -> None:
        self.progress.update(self.samples_per_step)
        self.progress.set_postfix({"lr": f"{rate:.2e}", **{name: f"{value:.4f}" for name, value in values.items()}})
        now = time.monotonic()
        speed, self.step_start = self.samples_per_step / (now - self.step_start), now
        shown = {"learning_rate": rate, **values, "samples_per_second": speed}
        with writing(self.output_dir / "logs"):
            self.accelerator.log({f"train/{name}": value for name, value in shown.items()}, step=self.step)
        if self.records is None:
            return
        self.records.add(self.step, {"learning_rate": rate, **values})
        if self.step % self.config.logging_steps == 0:
            means = " ".join(f"{name} {value:.4g}" for name, value in self.records.recent_means().items())
            logger.info("step %d %s (%.0f s)", self.step, means, time.monotonic() - self.start)

    def _show(self) -> None:
        """Make and measure validation pictures, if due at this step."""
        if self.validation is None:
            return
        if self.step % self.validation.every and self.step != self.config.max_train_steps:
            return
        part = self.validation.part
        network = self.averaged(part) if isinstance(part, str) else {name: self.averaged(name) for name in part}
        if self.is_main:
            metrics, pictures = self.validation.show(network, self.step)
            logger.info("step %d validation %s", self.step, " ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
            self.accelerator.log({f"validation/{name}": value for name, value in metrics.items()}, step=self.step)
            shown = {f"validation/{name}": pixels for name, pixels in pictures.items()}
            show_pictures(self.accelerator, shown, self.step)
        self.accelerator.wait_for_everyone()
        self.step_start = time.monotonic()

    def _stop_diverged(self, values: dict[str, float]) -> None:
        folder = self.output_dir / f"diverged-{self.step + 1}"
        self._write_state(folder)
        raise DivergenceError(
            f"step {self.step + 1} gave {values} or a gradient that is not finite; the state before it is in {folder}, "
            "the last good checkpoint beside it; resume with a lower learning_rate or mixed_precision=no"
        )
