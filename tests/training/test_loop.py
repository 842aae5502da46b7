"""The parts of a training run: options, data that depend on the index alone, checkpoints."""

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers.optimization import SchedulerType, get_scheduler

from stablesr_kit.errors import ConfigError
from stablesr_kit.models.feature_wrapping import (
    ControllableFeatureWrapping,
    decode_with_features,
    encode_with_features,
)
from stablesr_kit.training.data.batches import SampleDraws, SharedBatches, make_loader
from stablesr_kit.training.data.crops import PhotoCrops, RandomCrops
from stablesr_kit.training.data.options import PhotoOptions
from stablesr_kit.training.run.command_line import load_config
from stablesr_kit.training.run.config import RunConfig
from stablesr_kit.training.run.optimizers import learning_rate_schedule
from stablesr_kit.training.run.reporting import StepRecords
from stablesr_kit.training.small import build_small_autoencoder, fold_latent_statistics, start_fusion_silent
from tests.helpers.photo_files import save_photos


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleConfig(PhotoOptions, RunConfig):
    scales: tuple[float, ...] = (1.0,)
    folder: str | None = None


def test_flags_override_the_file_and_defaults_fill_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: out\nmax_train_steps: 10\nlearning_rate: 1e-3\nscales: [1, 0.5]\n")
    config = load_config(ExampleConfig, ["--config", str(file), "--max_train_steps=20", "--folder", "photos"])
    assert (config.max_train_steps, config.learning_rate, config.scales) == (20, 1e-3, (1.0, 0.5))
    assert (config.folder, config.seed) == ("photos", 0)


def test_a_single_value_stands_for_a_list_of_one() -> None:
    flags = ["--output_dir", "out", "--max_train_steps", "1"]
    config = load_config(ExampleConfig, [*flags, "--train_data_dir", "photos", "--scales", "1"])
    assert (config.train_data_dir, config.scales) == (("photos",), (1.0,))


def test_a_saved_config_loads_as_the_same_config(tmp_path: Path) -> None:
    config = ExampleConfig(output_dir="out", max_train_steps=3, scales=(1.0, 0.5))
    config.save(tmp_path / "config.yaml")
    assert load_config(ExampleConfig, ["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learnin_rate", "1"], "did you mean 'learning_rate'"),
        (["--output_dir", "out"], "max_train_steps must be given"),
        (["--output_dir", "out", "--max_train_steps", "many"], "max_train_steps=many must be int"),
        (["--output_dir", "out", "--max_train_steps", "0"], "at least 1"),
        (["--output_dir", "out", "--max_train_steps", "1", "--small_photos", "crop"], "must be skip or pad"),
        (["--output_dir", "out", "--max_train_steps", "1", "--scales", "many"], "scales=many must be a list of float"),
        (["--output_dir"], "needs a value"),
        (["output_dir"], "expected --key value"),
    ],
)
def test_wrong_options_are_refused_with_what_to_do(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(ExampleConfig, flags)


def test_learning_rate_warms_up_holds_and_decays_to_its_end() -> None:
    config = ExampleConfig(
        output_dir="out",
        max_train_steps=100,
        learning_rate=1.0,
        final_learning_rate=0.1,
        lr_warmup_steps=10,
        lr_decay_fraction=0.5,
    )
    schedule = learning_rate_schedule(config, 1.0)
    rates = [schedule(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:51] == pytest.approx([1.0] * 41)
    assert rates[75] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)


def test_a_loader_resumed_after_some_steps_gives_the_remaining_batches(tmp_path: Path) -> None:
    folder = save_photos(tmp_path / "photos", 3)
    crops = RandomCrops(PhotoCrops(PhotoOptions(train_data_dir=(str(folder),), resolution=16), 0))
    whole = list(make_loader(crops, SharedBatches(2, 0, 5)))
    rest = list(make_loader(crops, SharedBatches(2, 3, 5)))
    assert len(whole) == 5
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(whole[3:], rest, strict=True))


def test_processes_and_accumulated_batches_share_the_samples_of_a_step() -> None:
    whole = [index for batch in SharedBatches(8, 3, 5) for index in batch]
    # two processes, two batches of two samples per step
    shares = [list(SharedBatches(2, 3 * 2, 5 * 2, 2, process)) for process in (0, 1)]
    assert sorted(index for share in shares for batch in share for index in batch) == whole
    assert [len(share) for share in shares] == [4, 4]


def test_draws_of_a_sample_depend_on_seed_and_number_alone() -> None:
    together = SampleDraws(0, torch.tensor([5, 6, 7]), 3)
    apart = [SampleDraws(0, torch.tensor([index]), 3) for index in (5, 6, 7)]
    like = torch.empty(3, 4, 2)
    noise = together.normal(like)
    assert torch.equal(noise, torch.cat([draws.normal(like[:1]) for draws in apart]))
    assert torch.equal(together.uniform(), torch.cat([draws.uniform() for draws in apart]))
    assert not torch.equal(noise, SampleDraws(1, torch.tensor([5, 6, 7]), 3).normal(like))
    assert not torch.equal(noise, together.normal(like))


def test_folding_normalises_latents_and_keeps_reconstructions() -> None:
    torch.manual_seed(0)
    vae = build_small_autoencoder((8, 16), 4, 1).double()
    image = torch.rand(4, 3, 32, 32, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        before = vae.encode(image).latent_dist
        reconstruction = vae.decode(before.mean).sample
        latents = before.mean
        fold_latent_statistics(vae, latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)))
        after = vae.encode(image).latent_dist
        torch.testing.assert_close(vae.decode(after.mean).sample, reconstruction)
    torch.testing.assert_close(after.mean.mean(dim=(0, 2, 3)), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(after.mean.std(dim=(0, 2, 3)), torch.ones(4, dtype=torch.float64))
    # the posterior is as wide as before, in units of the latent
    expected = before.std / latents.std(dim=(0, 2, 3))[:, None, None]
    torch.testing.assert_close(after.std, expected)


def test_silent_fusion_hardly_changes_the_plain_decode() -> None:
    torch.manual_seed(0)
    vae = build_small_autoencoder((8, 16, 16), 4, 1)
    cfw = ControllableFeatureWrapping.from_vae(vae, num_rrdb=1, growth_channels=4)
    start_fusion_silent(cfw)
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        posterior, features = encode_with_features(vae, image, (1, 2))
        plain = vae.decode(posterior.mean).sample
        wrapped = decode_with_features(vae, cfw, posterior.mean, features, 1.0)
    assert (plain - wrapped).abs().max() < 0.05 * plain.abs().max()


def test_stratified_timesteps_take_one_from_each_part_of_the_schedule() -> None:
    halves = [SampleDraws(0, torch.arange(first, first + 5), 10) for first in (30, 35)]
    timesteps = torch.cat([half.timesteps(1000, stratified=True) for half in halves])
    assert [t // 100 for t in timesteps.tolist()] == list(range(10))


def test_plain_timesteps_cover_the_schedule() -> None:
    timesteps = SampleDraws(0, torch.arange(4000), 8).timesteps(1000, stratified=False)
    assert timesteps.min() < 5 and timesteps.max() > 994
    assert timesteps.double().mean().item() == pytest.approx(499.5, abs=15)


def test_records_are_cut_back_to_the_step_a_run_resumes_from(tmp_path: Path) -> None:
    file = tmp_path / "losses.jsonl"
    records = StepRecords(file, 0)
    records.add(1, {"a": 1.0})
    records.add(2, {"a": 3.0, "b": 5.0})
    assert records.recent_means() == {"a": 2.0, "b": 5.0}
    assert records.recent_means() == {}
    before = file.read_text()
    records.add(3, {"a": 4.0})
    records.close()
    with file.open("a") as stream:
        stream.write('{"step": 4, "a"')  # killed in the middle of a line
    StepRecords(file, 2).close()
    assert file.read_text() == before


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT])
def test_a_named_schedule_is_the_one_that_diffusers_steps(name: str) -> None:
    config = ExampleConfig(
        output_dir="out", max_train_steps=12, lr_scheduler=name, lr_warmup_steps=3, lr_num_cycles=2, lr_power=2.0
    )
    schedule = learning_rate_schedule(config, 3e-4)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=3e-4)
    peer = get_scheduler(
        name, optimizer, num_warmup_steps=3, num_training_steps=12, num_cycles=config.lr_num_cycles, power=2.0
    )
    for step in range(13):
        assert schedule(step) == pytest.approx(peer.get_last_lr()[0], rel=1e-12, abs=1e-18)
        optimizer.step()
        peer.step()


def test_a_schedule_that_is_not_known_is_refused_with_those_that_are() -> None:
    for name in ("linaer", "piecewise_constant"):
        with pytest.raises(
            ConfigError, match=f"'{name}' is unknown; use one of warmup_plateau_cosine, multistep, linear"
        ):
            learning_rate_schedule(ExampleConfig(output_dir="out", max_train_steps=1, lr_scheduler=name), 1.0)
