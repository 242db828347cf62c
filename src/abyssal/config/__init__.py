"""What a run is: model shape, data, objective, schedules; read from recipes and config.json. No torch."""

from abyssal.config.model import ModelConfig, RopeScaling
from abyssal.config.recipe import load_recipe, packaged_recipes
from abyssal.config.run import RunConfig
from abyssal.config.schedule import Segment, ValueSchedule

__all__ = ["ModelConfig", "RopeScaling", "RunConfig", "Segment", "ValueSchedule", "load_recipe", "packaged_recipes"]
