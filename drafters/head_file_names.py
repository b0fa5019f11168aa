"""What the files of the lookahead half of an adapter directory are called; for those who must not import torch."""

CONFIG_FILE = "lookahead_config.json"
WEIGHTS_FILE = "lookahead.safetensors"
HISTORY_FILE = "lookahead_history.bin"
LOOKAHEAD_FILES = (CONFIG_FILE, WEIGHTS_FILE, HISTORY_FILE)
