"""Text that the teacher writes for the student to learn."""
