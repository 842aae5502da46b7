"""Options of programs that train on photographs, and the source of photographs they describe."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from stablesr_kit.errors import ConfigError
from stablesr_kit.training.data.sources import DatasetPhotos, FolderPhotos, PhotoSource, ShardPhotos
from stablesr_kit.training.run.config import CheckedOptions


@dataclass(frozen=True, kw_only=True)
class PhotoOptions(CheckedOptions):
    """Options of programs that train on photographs: source, selection and crops.

    Exactly one of train_data_dir, dataset_name and shards must be given.
    """

    train_data_dir: tuple[str, ...] = ()
    """Folders of photographs, searched recursively."""
    dataset_name: str | None = None
    """Hugging Face dataset: a folder of save_to_disk, a folder of pictures or parquet files, or a repository."""
    dataset_config_name: str | None = None
    """Configuration of that dataset; None if it has only one."""
    dataset_split: str = "train"
    """Split of that dataset."""
    image_column: str = "image"
    """Column of the photographs in that dataset."""
    shards: str | None = None
    """WebDataset shards: `set-*.tar`, `set-{000..127}.tar`, or a JSON index of local or remote shards."""
    photo_scales: tuple[float, ...] = (1.0,)
    """Photographs in folders are used once at each of these scales; smaller scales hide compression artefacts."""
    favourite_photos: tuple[str, ...] = ()
    """Patterns of file names in folders; these photographs are drawn twice as often."""
    excluded_photos: tuple[str, ...] = ()
    """Patterns of file names in folders; these photographs are left out."""
    min_photo_area_px: int = 0
    """Photographs with fewer pixels are skipped; StableSR: 147456, which is 384 x 384."""
    min_photo_bytes: int = 0
    """Photographs whose files have fewer bytes are skipped as too compressed; StableSR: 102400."""
    resolution: int = 512
    """Side of the square crops in px."""
    small_photos: Literal["skip", "pad"] = "skip"
    """How photographs smaller than a crop are used; pad continues them by reflection, as StableSR does."""
    random_flip: bool = True
    """Whether crops are mirrored at random."""
    random_rotation: bool = False
    """Whether crops are turned by a random multiple of 90 degrees; not for faces."""
    photo_cache_mb: int = 1024
    """Memory per loader process for decoded photographs, so that small sets are decoded only once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolution < 1:
            raise ConfigError(f"resolution={self.resolution} must be at least 1")
        if not self.photo_scales or min(self.photo_scales) <= 0:
            raise ConfigError(f"photo_scales={self.photo_scales} must be positive numbers, such as (1.0, 0.5)")


@dataclass(frozen=True, kw_only=True)
class DegradedPhotoOptions(PhotoOptions):
    """Options of programs that degrade photographs on the fly."""

    degradations: Mapping[str, float] = field(default_factory=lambda: {"stablesr-512": 1.0})
    """Names of degradations and how often each is drawn (`stablesr degrade --list`)."""
    use_usm: bool | None = None
    """Whether HQ pictures are sharpened (unsharp masking); None leaves it to the degradation."""
    no_degradation_prob: float | None = None
    """Probability that the LQ picture is the HQ picture itself; None leaves it to the degradation."""


@dataclass(frozen=True, kw_only=True)
class PairOptions(DegradedPhotoOptions):
    """Options of programs that train on LQ-HQ pairs, which are given or degraded on the fly."""

    lq_data_dir: str | None = None
    """Folder of the LQ versions, under the same relative names; None degrades the photographs instead."""
    lq_name_ending: str = ""
    """Suffix of the names in lq_data_dir, such as x4 if 0001x4.png belongs to 0001.png."""
    conditioning_image_column: str | None = None
    """Column of the LQ versions; None degrades the photographs instead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lq_data_dir is not None and len(self.photo_scales) > 1:
            raise ConfigError("photo_scales cannot be used with lq_data_dir: pairs have the size they have")


def open_source(options: PhotoOptions) -> PhotoSource:
    """The photographs of the options, with their LQ versions if they come in pairs.

    Raises ConfigError or ImageError if there are none.
    """
    given = {
        "train_data_dir": bool(options.train_data_dir),
        "dataset_name": options.dataset_name is not None,
        "shards": options.shards is not None,
    }
    chosen = [name for name, is_given in given.items() if is_given]
    if len(chosen) != 1:
        raise ConfigError(f"{' and '.join(chosen) or 'no photographs'} given; give one of {', '.join(given)}")
    pairing = options if isinstance(options, PairOptions) else PairOptions()
    if options.shards is not None:
        return ShardPhotos(options.shards)
    if options.dataset_name is not None:
        return DatasetPhotos(
            options.dataset_name,
            name=options.dataset_config_name,
            split=options.dataset_split,
            column=options.image_column,
            lq_column=pairing.conditioning_image_column,
        )
    return FolderPhotos(
        options.train_data_dir,
        options.photo_scales,
        options.favourite_photos,
        pairing.lq_data_dir,
        pairing.lq_name_ending,
        options.excluded_photos,
    )
