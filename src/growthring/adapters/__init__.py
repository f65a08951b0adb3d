"""Adapters of our own, as PEFT tuners. Stock PEFT adapters need nothing from here, and none of ours has landed yet."""
