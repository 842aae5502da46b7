"""Discriminators that are trained beside a network: their options, their own loss, and the network's."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stablesr_kit.models.discriminators import PatchDiscriminator, VQGANDiscriminator
from stablesr_kit.training.losses.pictures import HINGE, adaptive_adversarial_weight, feature_matching_loss
from stablesr_kit.training.run.networks import judging, load_network
from stablesr_kit.training.run.run import TrainingRun


@dataclass(frozen=True, kw_only=True)
class AdversarialOptions:
    """The discriminator."""

    adversarial_weight: float = 0.0
    """Weight of the generator's loss against the discriminator; with feature_matching_weight 0 too, there is none."""
    feature_matching_weight: float = 0.0
    """Weight of the difference between the discriminator's features of both pictures."""
    discriminator_start: int = 0
    """Steps before the discriminator is trained and counts."""
    discriminator_warmup_steps: int = 200
    """Steps over which the weights of both losses then rise linearly from zero."""
    discriminator_learning_rate: float = 4e-4
    """Constant learning rate of the discriminator."""
    discriminator_channels: int = 32
    """Width of the discriminator's first layer."""
    discriminator_halvings: int = 2
    """Layers of stride 2 of the discriminator: every one doubles the patches it judges."""


class Adversary:
    """A discriminator that is trained by the run, beside the network it judges.

    Both see each other as they were before the step, so that a step is the same however its samples are split into
    batches and processes.
    """

    def __init__(self, run: TrainingRun, options: AdversarialOptions) -> None:
        self.run = run
        self.options = options
        network = PatchDiscriminator(
            base_channels=options.discriminator_channels, num_halvings=options.discriminator_halvings
        )
        self.discriminator = run.train(
            network.to(memory_format=torch.channels_last).eval(),  # its norms move once per step, see below
            {"discriminator": ""},
            learning_rate=options.discriminator_learning_rate,
            betas=(0.5, 0.9),
            weight_decay=0.0,
            is_clipped=False,
            average=False,
        )

    def judge(self, fake: Tensor, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss that the network which made `fake` is to add to its own, and its terms for the record.

        fake, real: (B, 3, H, W) in [-1, 1]. The gradients of the discriminator's own loss are taken here. Before
        discriminator_start the loss is zero and there are no terms.
        """
        options, run = self.options, self.run
        waited = run.step - options.discriminator_start
        if waited < 0:
            return fake.new_zeros(()), {}

        # its own loss: told from the photographs
        with run.accelerator.autocast():
            both = torch.cat([real, fake.detach()])
            logits, features = self.discriminator(both, update_norms=run.is_first_batch_of_step)
        real_logits, fake_logits = logits.float().chunk(2)
        discriminator_loss = 0.5 * (HINGE.real(real_logits) + HINGE.fake(fake_logits))
        run.backward(discriminator_loss)

        # the other's loss: close to the photographs to the discriminator's eye, which is not trained by this
        with judging(self.discriminator, run.accelerator), run.accelerator.autocast():
            fake_logits, fake_features = self.discriminator(fake)
        matching = feature_matching_loss(fake_features, [feature.detach().chunk(2)[0] for feature in features])
        adversarial = HINGE.generator(fake_logits.float())
        ramp = min(1.0, waited / max(options.discriminator_warmup_steps, 1))
        loss = ramp * (options.feature_matching_weight * matching + options.adversarial_weight * adversarial)
        return loss, {"matching": matching, "adversarial": adversarial, "discriminator": discriminator_loss}


@dataclass(frozen=True, kw_only=True)
class VQGANAdversaryOptions:
    """CodeFormer's discriminator."""

    adversarial_weight: float = 0.0
    """Weight of the adversarial loss once it pulls as hard as the reconstruction loss; 0: there is no discriminator."""
    discriminator_start: int = 0
    """Steps before the discriminator is trained and counts."""
    discriminator_channels: int = 64
    """Width of an untrained discriminator's first layer."""
    discriminator_layers: int = 4
    """How often an untrained discriminator halves the picture."""
    pretrained_discriminator: str | None = None
    """Folder of a discriminator to start from, that of stage I for stage III; None builds an untrained one."""


class VQGANAdversary:
    """A discriminator that is trained by the run with the options' own learning rate and betas."""

    def __init__(self, run: TrainingRun, options: VQGANAdversaryOptions) -> None:
        self.run = run
        self.options = options
        if options.pretrained_discriminator is None:
            discriminator = VQGANDiscriminator(
                base_channels=options.discriminator_channels, num_layers=options.discriminator_layers
            )
        else:
            discriminator = load_network(
                VQGANDiscriminator, options.pretrained_discriminator, "pretrained_discriminator"
            )
        self.discriminator = run.train(discriminator.train(), {"discriminator": ""}, is_clipped=False, average=False)

    def judge(
        self, fake: Tensor, real: Tensor, reconstruction: Tensor, last_layer: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss that the network which made `fake` adds to its own, and its terms for the record.

        fake, real: (B, 3, H, W) in [-1, 1]; reconstruction: the loss between them, whose gradient with respect to
        last_layer, a weight of that network, sets the adversarial loss's share. The gradients of the discriminator's
        own loss are taken here. Before discriminator_start the loss is zero and there are no terms.
        """
        run = self.run
        if run.step < self.options.discriminator_start:
            return fake.new_zeros(()), {}

        # the generator's loss: the discriminator is not trained by this
        with judging(self.discriminator, run.accelerator), run.accelerator.autocast():
            logits = self.discriminator(fake)
        adversarial = HINGE.generator(logits.float())
        weight = self.options.adversarial_weight * adaptive_adversarial_weight(reconstruction, adversarial, last_layer)

        # its own: photographs and fakes are normalised by the statistics of their own batch
        with run.accelerator.autocast():
            real_logits = self.discriminator(real)
        real_loss = HINGE.real(real_logits.float())
        run.backward(real_loss)
        with run.accelerator.autocast():
            fake_logits = self.discriminator(fake.detach())
        fake_loss = HINGE.fake(fake_logits.float())
        run.backward(fake_loss)
        terms = {"adversarial": adversarial, "adversarial_weight": weight, "discriminator": real_loss + fake_loss}
        return weight * adversarial, terms
