"""Train CodeFormer's stages II and III, inpainting and colorization (Zhou et al. 2022, sec. 3.2 and 3.3).

Quantiser and decoder are those of the VQGAN of stage I, and stay frozen. The targets are its codes of the HQ face.

accelerate launch training/train_codeformer.py --config configs/official/codeformer_stage2.yaml --train_data_dir FACES
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from stablesr_kit.errors import ConfigError
from stablesr_kit.evaluation.quality import Quality
from stablesr_kit.models.codeformer import CodeFormer
from stablesr_kit.models.vqgan import VQGAN
from stablesr_kit.pipelines.codeformer import CodeFormerPipeline
from stablesr_kit.spaces import image_to_pixels, unit_to_image
from stablesr_kit.training.data.crops import PhotoCrops, report_skipped
from stablesr_kit.training.data.faces import StoredCodes, TwiceDegradedFaces
from stablesr_kit.training.data.options import DegradedPhotoOptions
from stablesr_kit.training.losses.adversarial import VQGANAdversary, VQGANAdversaryOptions
from stablesr_kit.training.losses.codebooks import code_token_loss, commitment_loss
from stablesr_kit.training.losses.pictures import PictureLoss, PictureLossOptions
from stablesr_kit.training.run.command_line import launch
from stablesr_kit.training.run.config import RunConfig
from stablesr_kit.training.run.networks import load_network
from stablesr_kit.training.run.run import TrainingRun
from stablesr_kit.training.run.validation import Example, RestorationValidationOptions, restoration_examples


@dataclass(frozen=True, kw_only=True)
class CodeFormerConfig(
    VQGANAdversaryOptions, PictureLossOptions, RestorationValidationOptions, DegradedPhotoOptions, RunConfig
):
    """Options of this program."""

    pretrained_vqgan: str
    """Folder of the trained VQGAN, whose codes of the HQ face are the targets."""
    codes: str | None = None
    """File from generate_codes.py with the codes of the faces in train_data_dir; None computes codes in every step."""
    pretrained_codeformer: str | None = None
    """Folder of a CodeFormer to start from (for stage III that of stage II); None builds one around the VQGAN."""
    dim: int = 512
    """Width of an untrained transformer."""
    num_heads: int = 8
    """Its attention heads."""
    num_layers: int = 9
    """Its layers."""
    fuse_sizes: tuple[int, ...] = (32, 64, 128, 256)
    """Sizes in px of the feature maps that are fused into the decoder of an untrained CodeFormer."""
    w: float = 0.0
    """Weight of the fused features. 0 trains the prediction of codes only, and no fusion layers."""
    late_w: float | None = None
    """Another w from step late_w_start on; None: the same."""
    late_w_start: int = 0
    """First step with late_w."""
    w_spread: float = 0.0
    """The weight of each face is drawn between w - w_spread and w, so that the model learns a range of weights."""
    mild_degradations: Mapping[str, float] = field(default_factory=dict)
    """Degradations of the faces that are decoded; `degradations` is then for predicting codes only. Empty: the
    same degraded face is used for both."""
    codes_only_start: int | None = None
    """From this step on, only codes are predicted; None: every step also decodes."""
    alternation_start: int | None = None
    """From this step on, every decoding_interval-th step decodes as well; None: none does."""
    decoding_interval: int = 15
    """See alternation_start."""
    feature_weight: float = 1.0
    """Weight of the distance between the latent of the LQ face and the codes of the HQ face."""
    token_weight: float = 0.5
    """Weight of the cross-entropy of the predicted codes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.w_spread <= self.w:
            raise ConfigError(f"w_spread={self.w_spread} must lie between 0 and w={self.w}")

    def fidelity(self, step: int) -> float:
        """w of a step; 0 if only codes are predicted."""
        if self.codes_only_start is not None and step >= self.codes_only_start:
            is_alternating = self.alternation_start is not None and step >= self.alternation_start
            if not is_alternating or (step + 1) % self.decoding_interval:
                return 0.0
        return self.w if self.late_w is None or step < self.late_w_start else self.late_w


def main(config: CodeFormerConfig) -> None:
    """Train, write checkpoints, and save averaged weights to output_dir/codeformer, the discriminator beside them."""
    # codes of an untrained VQGAN would be meaningless, so a trained one is required
    vqgan = load_network(VQGAN, config.pretrained_vqgan, "pretrained_vqgan").eval().requires_grad_(False)
    run = TrainingRun(config, some_rest=config.codes_only_start is not None)
    crops = PhotoCrops(config, config.seed, run.share)
    stored = StoredCodes(config.codes, crops) if config.codes is not None else None
    faces = TwiceDegradedFaces(crops, config.mild_degradations, stored)

    vqgan.to(run.accelerator.device)
    if stored is not None:
        stored.check(vqgan, crops.draw(0))
    codeformer = load_codeformer(config, vqgan).to(memory_format=torch.channels_last)
    codeformer.vqgan.quantizer.requires_grad_(False)
    codeformer.vqgan.decoder.requires_grad_(False)
    codeformer.fusions.requires_grad_(config.w > 0)
    if config.gradient_checkpointing:
        codeformer.enable_gradient_checkpointing()
    restore = run.train(codeformer.train(), {"codeformer": ""})
    picture_loss = PictureLoss(config, run.accelerator.device)
    adversary = VQGANAdversary(run, config) if config.adversarial_weight > 0 else None
    fusion = codeformer.fusions[str(codeformer.config.fuse_sizes[-1])] if adversary is not None else None

    def restored(codeformer: CodeFormer, example: Example) -> Tensor:
        pipeline = CodeFormerPipeline(codeformer)
        faces = pipeline(image_to_pixels(example.lq), w=config.w, output_type="pt", return_dict=False)[0]
        return unit_to_image(faces)

    run.validate(
        config,
        "codeformer",
        restoration_examples(config),
        restored,
        Quality(config.niqe_statistics, config.metric_weights),
    )

    for draws, (strong, mild, hq, targets) in run.batches(faces):
        w = config.fidelity(run.step)
        lq = (mild if w > 0 else strong).to(memory_format=torch.channels_last)
        hq = hq.to(memory_format=torch.channels_last)

        # predict the codes of the HQ face from the LQ face
        with torch.no_grad(), run.accelerator.autocast():
            if stored is None:
                targets = vqgan.quantizer.nearest(vqgan.encoder(hq)[0])
            codes = vqgan.quantizer.lookup(targets)
        weights = w - config.w_spread * draws.uniform().to(lq) if w > 0 else w
        output = restore(lq, weights, code_only=w == 0)
        feature = commitment_loss(output.lq_feat.float(), codes.float())
        token = code_token_loss(output.logits, rearrange(targets, "b h w -> b (h w)"))
        loss = config.feature_weight * feature + config.token_weight * token
        accuracy = (output.indices == targets).float().mean()
        terms = {"feature": feature, "token": token, "accuracy": accuracy}

        # reconstruct the HQ face with features of the LQ face
        if w > 0:
            fake = output.image.float()
            image_loss, image_terms = picture_loss(fake, hq)
            loss, terms = loss + image_loss, terms | image_terms
            if adversary is not None and fusion is not None:
                adversarial, judged = adversary.judge(fake, hq, image_loss, fusion.shift[2].weight)
                loss, terms = loss + adversarial, terms | judged
        run.backward(loss)
        run.update(**terms)

    report_skipped(crops, run.accelerator)
    names = ["codeformer"] + (["discriminator"] if adversary is not None else [])
    run.finish({name: run.averaged(name) for name in names})


def load_codeformer(config: CodeFormerConfig, vqgan: VQGAN) -> CodeFormer:
    """The CodeFormer to start from. Raises ConfigError if its codebook is not that of the VQGAN."""
    if config.pretrained_codeformer is None:
        return CodeFormer.from_vqgan(vqgan, config.dim, config.num_heads, config.num_layers, config.fuse_sizes)
    codeformer = load_network(CodeFormer, config.pretrained_codeformer, "pretrained_codeformer")
    ours, theirs = codeformer.vqgan.quantizer.codebook.weight, vqgan.quantizer.codebook.weight
    if ours.shape != theirs.shape or not torch.equal(ours, theirs.to(ours)):
        raise ConfigError(
            f"{config.pretrained_codeformer} has another codebook than {config.pretrained_vqgan}; "
            "give the VQGAN that it was trained with"
        )
    return codeformer


if __name__ == "__main__":
    launch(main, CodeFormerConfig)
