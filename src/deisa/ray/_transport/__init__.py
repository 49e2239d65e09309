"""The hand-off between rank and agent: addresses, messages, slots, and the two ends of the socket."""
