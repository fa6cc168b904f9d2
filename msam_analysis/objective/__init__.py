"""The loss as a function of the weights, with its derivatives, for any model and any data.

Batches, statistics of BatchNorm, the private copy of the network, flat vectors, operators and private random streams
live here. Nothing here asks a question. This room may import ``results``.
"""

from msam_analysis.objective.examination import Examination, ExaminationError
from msam_analysis.objective.objective import Objective
from msam_analysis.objective.operators import MatrixOperator, SymmetricOperator

__all__ = ["Examination", "ExaminationError", "MatrixOperator", "Objective", "SymmetricOperator"]
