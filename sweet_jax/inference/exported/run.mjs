// Runs an exported model in Node.js:
//
// npm install --ignore-scripts
// node run.mjs [float32 | int8] < texts.jsonl
//
// Each line is a text as a JSON string, or a pair of texts as an array of two. Prints a JSON line
// for each: label, probability, exit (a layer), cost (share of all layers), probabilities of all
// classes.
import { text } from "node:stream/consumers";
import * as ort from "onnxruntime-node";
import { Classifier } from "./classifier.mjs";

function parse(line, number) {
  try {
    return JSON.parse(line);
  } catch {
    throw new Error(`line ${number} is not JSON: ${JSON.stringify(line.slice(0, 80))}`);
  }
}

try {
  const lines = (await text(process.stdin)).split("\n");
  const rows = lines.flatMap((line, index) => (line.trim() ? [parse(line, index + 1)] : []));
  const classifier = await Classifier.load(ort, process.argv[2]);
  for (const answer of await classifier.predict(rows)) console.log(JSON.stringify(answer));
} catch (error) {
  console.error(`error: ${error.message}`);
  process.exitCode = 2;
}
