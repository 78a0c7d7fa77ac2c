"""Training code with one mistake each."""

from . import mutant


@mutant("accumulation", "schedule", "once a micro-batch")
def schedule_by_micro_batch(model, batches, loss_fn, optimizer, scheduler):
    optimizer.zero_grad()
    for inputs, targets in batches:
        (loss_fn(model(inputs), targets) / len(batches)).backward()
        scheduler.step()
    optimizer.step()


@mutant("accumulation", "gradient", "reset between")
def gradients_reset(model, batches, loss_fn, optimizer, scheduler):
    for inputs, targets in batches:
        optimizer.zero_grad()
        (loss_fn(model(inputs), targets) / len(batches)).backward()
    optimizer.step()
    scheduler.step()


@mutant("vocabulary", "leak", "validation or test")
def vocabulary_of_everything(train, val, test):
    return {word for text in train + val + test for word in text.split()}
