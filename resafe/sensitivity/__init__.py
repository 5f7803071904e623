"""What each weight of a model does for given conversations: second moments of its inputs, moments of its gradients, and scores."""

from resafe.sensitivity.activations import InputMoment, input_moments
from resafe.sensitivity.batches import Batch, answers, prompts
from resafe.sensitivity.gradients import GradientMoment, gradient_moments
from resafe.sensitivity.hidden import direction_gradient, mean_hidden
from resafe.sensitivity.linears import linears, stacks, weights
from resafe.sensitivity.scores import hessian, snip, top_share, wanda

__all__ = [
    "Batch",
    "GradientMoment",
    "InputMoment",
    "answers",
    "direction_gradient",
    "gradient_moments",
    "hessian",
    "input_moments",
    "linears",
    "mean_hidden",
    "prompts",
    "snip",
    "stacks",
    "top_share",
    "wanda",
    "weights",
]
