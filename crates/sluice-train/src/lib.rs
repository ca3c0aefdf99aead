//! Losses, distillation stages, optimizer schedule, trainer, resume.
