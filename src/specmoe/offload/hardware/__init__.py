"""What a machine can do: how fast experts reach it, and how fast it computes with them."""
