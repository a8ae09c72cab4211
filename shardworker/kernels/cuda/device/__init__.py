"""What Triton compiles: functions of tiles. They know nothing but pointers and sizes; nothing here is called as Python."""
