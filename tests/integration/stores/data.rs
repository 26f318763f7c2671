//! Data of jobs: of every kind of file, in several ones, on this machine and in an object store, with the same bits.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use serde_json::json;

use super::{Stored, s3, same_weights};
use crate::harness::{Cluster, Run, root, run, spec, text};

/// Rows of the committed file, header left out: name, label, registered domain.
fn rows() -> Vec<[String; 3]> {
    let unpacked =
        Command::new("gzip").arg("-dc").arg(root().join("jobs/data/domains.csv.gz")).output().expect("run gzip");
    let text = String::from_utf8(unpacked.stdout).expect("UTF-8");
    let mut lines = text.lines();
    let header: Vec<&str> = lines.next().expect("a header").split(',').collect();
    let places =
        ["domain", "label", "registered"].map(|name| header.iter().position(|other| *other == name).expect("a column"));
    let row = |line: &str| {
        let fields: Vec<&str> = line.split(',').collect();
        places.map(|place| fields[place].to_owned())
    };
    // Every tenth: enough for both labels, few enough to be quick.
    lines.step_by(10).map(row).collect()
}

/// The same rows in files of each kind, three of them in the order of their names; patterns of them.
fn write(folder: &Path, rows: &[[String; 3]]) -> [String; 3] {
    let part = rows.len().div_ceil(3);
    for (number, rows) in rows.chunks(part).enumerate() {
        let at = |end: &str| folder.join(format!("names-{number}.{end}"));
        let lines: String = rows.iter().map(|row| row.join(",") + "\n").collect();
        std::fs::write(at("csv"), format!("domain,label,registered\n{lines}")).expect("written");
        let packed = Command::new("gzip").arg(at("csv")).status().expect("run gzip");
        assert!(packed.success());
        write_parquet(&at("parquet"), rows);
        write_shard(&at("tar"), rows);
    }
    ["csv.gz", "parquet", "tar"].map(|end| format!("names-*.{end}"))
}

fn write_parquet(path: &Path, rows: &[[String; 3]]) {
    let schema = "message names { required binary label (UTF8); required binary domain (UTF8); required binary registered (UTF8); }";
    let schema = Arc::new(parse_message_type(schema).expect("a schema"));
    let file = std::fs::File::create(path).expect("a file");
    let mut writer = SerializedFileWriter::new(file, schema, Arc::default()).expect("a writer");
    let mut group = writer.next_row_group().expect("a group");
    for field in [1, 0, 2] {
        let values: Vec<ByteArray> = rows.iter().map(|row| ByteArray::from(row[field].as_str())).collect();
        let mut column = group.next_column().expect("a column").expect("there is one");
        column.typed::<ByteArrayType>().write_batch(&values, None, None).expect("written");
        column.close().expect("closed");
    }
    group.close().expect("closed");
    writer.close().expect("closed");
}

/// Half of a row's columns in one member, half in another.
fn write_shard(path: &Path, rows: &[[String; 3]]) {
    let mut builder = tar::Builder::new(std::fs::File::create(path).expect("a file"));
    for (number, [domain, label, registered]) in rows.iter().enumerate() {
        let object = json!({ "label": label, "registered": registered }).to_string();
        for (end, text) in [("domain", domain), ("json", &object)] {
            let mut header = tar::Header::new_gnu();
            header.set_size(text.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, format!("{number:06}.{end}"), text.as_bytes()).expect("added");
        }
    }
    builder.finish().expect("finished");
}

fn local(folder: &Path, pattern: &str, nodes: u32) -> serde_json::Value {
    let train = folder.join(pattern);
    Run::new("domains.toml", nodes).set("train.steps", 6).set("data.train", train.display()).finish().0
}

#[test]
fn the_same_rows_give_the_same_weights_from_every_kind_of_file_here_and_in_s3() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let patterns = write(folder.path(), &rows());
    let here = local(folder.path(), &patterns[0], 1);
    for pattern in &patterns[1..] {
        same_weights(&local(folder.path(), pattern, 2), &here);
    }
    // More than is kept in memory.
    let train = folder.path().join(&patterns[1]);
    let filed = Run::new("domains.toml", 2).set("train.steps", 6).set("data.train", train.display());
    same_weights(&filed.env("STOKE_SAMPLES_HELD_BYTES", "10000").finish().0, &here);
    let Some(server) = s3() else { return };
    let files: Vec<PathBuf> =
        std::fs::read_dir(folder.path()).expect("a folder").flatten().map(|file| file.path()).collect();
    for file in &files {
        server.put(&format!("data/{}", file.file_name().expect("a name").to_string_lossy()), file);
    }
    for pattern in &patterns {
        let stored = Stored::new(server, server.port, "of-data", 2).spec("domains.toml");
        let there = format!("{}/data/{pattern}", server.bucket());
        let (summary, _scratch) = stored.set("train.steps", 6).set("data.train", there).finish();
        same_weights(&summary, &here);
    }
    // What is not there is said by the rank, with its place; so is what cannot be reached.
    let failed = |name: &str, key: Option<(&str, &str)>| {
        let stored = Stored::new(server, server.port, "of-none", 1).spec("domains.toml").set("train.steps", 6);
        let stored = stored.set("data.train", format!("{}/data/{name}", server.bucket())).set("restart.attempts", 1);
        let (running, _scratch) =
            key.into_iter().fold(stored, |stored, (name, value)| stored.variable(name, value)).start();
        running.wait().expect(1)
    };
    failed("none.csv", None).says(&["data/none.csv", "there is no such object"]);
    failed("none-*.csv", None).says(&["no file fits this pattern", "none-*.csv"]);
    failed(&patterns[1], Some(("AWS_SECRET_ACCESS_KEY", "wrong")))
        .says(&["AWS_SECRET_ACCESS_KEY", "environment of the node"]);
}

#[test]
fn files_that_cannot_be_are_refused_before_anything_starts() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (missing, odd) = (folder.path().join("no-*.csv"), folder.path().join("a.pdf"));
    std::fs::write(&odd, "x").expect("written");
    for (train, words) in
        [(missing, "no file fits this pattern"), (odd, "unknown kind of file"), ("ftp://a/b.csv".into(), "ftp://")]
    {
        let set = format!("data.train={}", train.display());
        let spec = spec("domains.toml");
        run(["run", spec.to_str().expect("UTF-8"), "--set", &set]).expect(2).says(&[words]);
    }
    // A damaged file is named by the rank that reads it.
    let damaged = folder.path().join("a.parquet");
    std::fs::write(&damaged, b"PAR1 and nothing more PAR1").expect("written");
    let cluster = Cluster::shared();
    let job = cluster.submit(2, &["--set", &format!("data.train={}", damaged.display())]);
    let failed = cluster.wait_for_state(&job, "failed");
    assert!(text(&failed["reason"]).contains("not a Parquet file that can be read"), "{failed:#}");
}
