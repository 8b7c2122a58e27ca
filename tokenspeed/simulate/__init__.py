"""The control plane under recorded agent sessions, on a virtual clock, without a device."""
