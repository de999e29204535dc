"""All sections of a recipe, by name. The other modules of this package define them."""

from persea.config.data_sections import (
    AuditionSection,
    CaptureSection,
    CorpusSection,
    DedupSection,
)
from persea.config.evaluation_sections import (
    BenchmarkSection,
    CheckSection,
    EvaluationSection,
    GradingSection,
    HeldOutTextsSection,
)
from persea.config.executor_section import ExecutorSection
from persea.config.generation_section import GenerationSection
from persea.config.model_sections import (
    TEXT_ONLY_MODEL,
    EndpointSection,
    FamilyName,
    LoraSection,
    ModelRef,
    RandomModelSection,
    StudentSection,
    TeacherSection,
)
from persea.config.release_section import ReleaseSection
from persea.config.section import (
    MAX_COUNT,
    NAME_PATTERN,
    SLUG_PATTERN,
    RecipeSection,
    check_contradictions,
)
from persea.config.task_section import TaskSection
from persea.config.training_sections import (
    LossBalancing,
    LossTerm,
    LRSchedule,
    OnPolicySection,
    TrainingSection,
)

__all__ = [
    "MAX_COUNT",
    "NAME_PATTERN",
    "SLUG_PATTERN",
    "TEXT_ONLY_MODEL",
    "AuditionSection",
    "BenchmarkSection",
    "CaptureSection",
    "CheckSection",
    "CorpusSection",
    "DedupSection",
    "EndpointSection",
    "EvaluationSection",
    "ExecutorSection",
    "FamilyName",
    "GenerationSection",
    "GradingSection",
    "HeldOutTextsSection",
    "LRSchedule",
    "LoraSection",
    "LossBalancing",
    "LossTerm",
    "ModelRef",
    "OnPolicySection",
    "RandomModelSection",
    "RecipeSection",
    "ReleaseSection",
    "StudentSection",
    "TaskSection",
    "TeacherSection",
    "TrainingSection",
    "check_contradictions",
]
