"""Pictures, sound and video files: numpy and bytes, never torch."""
