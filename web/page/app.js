"use strict";
// The snapshot as it is, once a second.
async function show() {
  const state = document.getElementById("state");
  try {
    const answer = await fetch("api/v1/snapshot");
    if (!answer.ok) throw new Error(`${answer.status} ${await answer.text()}`);
    const snapshot = await answer.json();
    state.textContent = [snapshot.state, ...snapshot.problems].join("; ");
    document.getElementById("snapshot").textContent = JSON.stringify(snapshot, null, 1);
  } catch (error) {
    state.textContent = String(error);
  }
  setTimeout(show, 1000);
}
show();
