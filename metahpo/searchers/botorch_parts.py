"""What of BoTorch and gpytorch is used, imported without the warnings of their own use of torch."""

import warnings

with warnings.catch_warnings():
    # They call torch.jit.script, which torch has deprecated.
    warnings.simplefilter("ignore", FutureWarning)
    from botorch.acquisition import AcquisitionFunction as AcquisitionFunction
    from botorch.acquisition import LogExpectedImprovement as LogExpectedImprovement
    from botorch.acquisition import ProbabilityOfImprovement as ProbabilityOfImprovement
    from botorch.acquisition import UpperConfidenceBound as UpperConfidenceBound
    from botorch.acquisition import qLogExpectedImprovement as qLogExpectedImprovement
    from botorch.exceptions.warnings import BotorchWarning as BotorchWarning
    from botorch.models.model import Model as Model
    from botorch.posteriors import GPyTorchPosterior as GPyTorchPosterior
    from botorch.sampling import SobolQMCNormalSampler as SobolQMCNormalSampler
    from gpytorch.distributions import MultivariateNormal as MultivariateNormal
