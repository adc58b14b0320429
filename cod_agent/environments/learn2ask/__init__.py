"""Learn2Ask: ask the patient one more question, or stop; what the clinic wants to know has to be found out."""

from cod_agent.environments.learn2ask.clinic import PRESETS, Preset
from cod_agent.environments.learn2ask.players import PLAYERS
from cod_agent.environments.learn2ask.world import Consultation, JudgedConsultation, Learn2Ask

__all__ = ["PLAYERS", "PRESETS", "Consultation", "JudgedConsultation", "Learn2Ask", "Preset"]
