"""Parts for a training loop of your own: losses, parameter groups, a frozen teacher, the phases of Sparsifiner."""

from vtoken.methods.sparsifiner.calibrate import calibrate_threshold
from vtoken.methods.sparsifiner.losses import distillation_loss, fine_tuning_loss, reconstruction_loss, token_loss
from vtoken.methods.sparsifiner.phases import backbone_parameters, parameter_groups, predictor_parameters, set_phase
from vtoken.methods.sparsifiner.published import load_published_state_dict
from vtoken.methods.sparsifiner.teacher import Teacher, TeacherOutput, logits_and_tokens

__all__ = [
    "Teacher",
    "TeacherOutput",
    "backbone_parameters",
    "calibrate_threshold",
    "distillation_loss",
    "fine_tuning_loss",
    "load_published_state_dict",
    "logits_and_tokens",
    "parameter_groups",
    "predictor_parameters",
    "reconstruction_loss",
    "set_phase",
    "token_loss",
]
