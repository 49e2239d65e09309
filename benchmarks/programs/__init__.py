"""Programs that cases run in processes of their own."""
