"""specserve serves many task LoRAs of one base model and speeds them up by exact speculation."""

__version__ = "0.1.0"
