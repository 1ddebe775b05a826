"""Before PyTorch is imported: threads that wait do not spin (see generate.py)."""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
