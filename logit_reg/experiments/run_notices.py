"""What the user is told of a run's settings before it trains."""

from logit_reg.attacks.engine.low_precision import NO_BFLOAT16, has_bfloat16
from logit_reg.evaluation import units
from logit_reg.experiments.settings import RunSettings
from logit_reg.messages import notice, tell
from logit_reg.training.adversaries import taking


def tell_of_settings(settings: RunSettings) -> None:
    """Tell of values in other units, of a beta that may collapse, and of a slow precision."""
    challenge, threat = settings.challenge, settings.training_adversary.threat
    found = [*units.noise_notices(settings.sigma, challenge.lower, challenge.upper)]
    if threat is not None:
        found += units.threat_notices(threat, challenge.image_shape)
    if threat is not None and settings.adversary in taking("step_size"):
        found += units.step_notices(threat, settings.num_steps, settings.step_size)
    tell(found)
    beta = settings.beta * max(factor for _, factor in settings.beta_schedule)
    if beta >= settings.collapse_threshold:
        notice(
            f"warning: beta {beta:g} is at or above {settings.collapse_threshold:.4g}, "
            f"from which on all-zero logits minimise this objective over free logits (batch "
            f"{settings.training_batch_size}, {challenge.num_classes} classes), so training may "
            f"collapse; watch mean_logit_norm and xent in log.csv."
        )
    if settings.train_dtype == "bfloat16" and not has_bfloat16():
        notice(f"{NO_BFLOAT16}: float32 is several times as fast here.")
