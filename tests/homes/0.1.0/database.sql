BEGIN TRANSACTION;
CREATE TABLE adapter_versions (
	id VARCHAR(40) NOT NULL, 
	project_id VARCHAR(40) NOT NULL, 
	created_at DATETIME NOT NULL, 
	created_by VARCHAR(80) NOT NULL, 
	adapter VARCHAR(48) NOT NULL, 
	version INTEGER NOT NULL, 
	digest VARCHAR(64) NOT NULL, 
	manifest_digest VARCHAR(64) NOT NULL, 
	base_model VARCHAR(48) NOT NULL, 
	base_digest VARCHAR(64) NOT NULL, 
	rank INTEGER NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	parent VARCHAR(64), 
	job_id VARCHAR(40), 
	state VARCHAR(16) NOT NULL, 
	state_code VARCHAR(40), 
	state_reason TEXT, 
	promoted_at DATETIME, 
	rolled_back_at DATETIME, 
	CONSTRAINT pk_adapter_versions PRIMARY KEY (id), 
	CONSTRAINT uq_adapter_versions_adapter_digest UNIQUE (adapter, digest), 
	CONSTRAINT uq_adapter_versions_adapter_version UNIQUE (adapter, version)
);
INSERT INTO "adapter_versions" VALUES('ver-01m8mrv68dvhb0rq4wdef9','proj_default','2026-11-29 23:04:35.341530','key:first-admin','support',1,'7885ccc27ca215712d5f5a0dc24d2fdb02beee9faf52c85cc4b8044c6b699a78','26e7aad37932af82881965ada857cb69de87216c3dfa2595ee2a2b05b1d9c935','tiny','33037bbbf2f9e23b3b059078b9c47b30467b8d9cc3954b404ec05aa6ebf3dcff',2,2879,NULL,NULL,'verified',NULL,NULL,'2026-11-29 23:04:37.808978',NULL);
INSERT INTO "adapter_versions" VALUES('ver-01m8mrv69vpba1hswkd5hb','proj_default','2026-11-29 23:04:35.387584','key:first-admin','support',2,'c99000235b4d0c7b0e1aeb9d38876ec5bcee0c40092f83428e9c5c5fbd2798da','2b61c85014ff937cec5dfe05239afe6b3111c37bbc1fe346bfe57c83f3db751d','tiny','33037bbbf2f9e23b3b059078b9c47b30467b8d9cc3954b404ec05aa6ebf3dcff',2,2879,NULL,NULL,'verified',NULL,NULL,'2026-11-29 23:04:37.831122','2026-11-29 23:04:37.848223');
INSERT INTO "adapter_versions" VALUES('ver-01m8mrv6am2fndehp8zzwr','proj_default','2026-11-29 23:04:35.412213','key:first-admin','support',3,'be252cdab8852ddbcfed8e39b616403637f7573124fd14c1497bdb8fcc824b27','b6cd4c2a1701834056b4dfa4918a5c4a3de7e2fac30c19aef8a74b11c1f607e4','tiny','33037bbbf2f9e23b3b059078b9c47b30467b8d9cc3954b404ec05aa6ebf3dcff',2,2879,NULL,NULL,'verified',NULL,NULL,NULL,NULL);
INSERT INTO "adapter_versions" VALUES('ver-01m8mrvars874243ndcpfh','proj_default','2026-11-29 23:04:39.961343','key:first-admin','tickets',1,'9adccbc2513956506eac9d74dab3f10ab4cb192fe08351eadcb65efdb90718d6','6e2279f6d440865c6802d097f464b80f97d4c972a2a41b12548cea4fff3c3b44','tiny','33037bbbf2f9e23b3b059078b9c47b30467b8d9cc3954b404ec05aa6ebf3dcff',2,2879,NULL,'ftjob-01m8mrv8qfpcbzgnb49299','verified',NULL,NULL,NULL,NULL);
CREATE TABLE adapters (
	name VARCHAR(48) NOT NULL, 
	project_id VARCHAR(40) NOT NULL, 
	created_at DATETIME NOT NULL, 
	created_by VARCHAR(80) NOT NULL, 
	CONSTRAINT pk_adapters PRIMARY KEY (name)
);
INSERT INTO "adapters" VALUES('support','proj_default','2026-11-29 23:04:35.341530','key:first-admin');
INSERT INTO "adapters" VALUES('tickets','proj_default','2026-11-29 23:04:39.961343','key:first-admin');
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0001');
CREATE TABLE api_keys (
	id VARCHAR(40) NOT NULL, 
	project_id VARCHAR(40) NOT NULL, 
	created_at DATETIME NOT NULL, 
	created_by VARCHAR(80) NOT NULL, 
	name VARCHAR(80) NOT NULL, 
	hash VARCHAR(64) NOT NULL, 
	scopes JSON NOT NULL, 
	expires_at DATETIME, 
	revoked_at DATETIME, 
	CONSTRAINT pk_api_keys PRIMARY KEY (id), 
	CONSTRAINT uq_api_keys_hash UNIQUE (hash)
);
INSERT INTO "api_keys" VALUES('key-01m8mrv5hjfd1d1pq83qzy','proj_default','2026-11-29 23:04:34.610760','system:first-start','first-admin','b4dac30f409ed872d7c3045cd9b34ab537763aaff89c67436ecb715d18d0e44a','["admin"]',NULL,NULL);
INSERT INTO "api_keys" VALUES('key-01m8mrv65fp53t238bne53','proj_default','2026-11-29 23:04:35.247743','key:first-admin','inference','7c64413d033117da8a1ae44899437b43788154df60b102f67aa7adebb35c1d9d','["inference"]',NULL,NULL);
INSERT INTO "api_keys" VALUES('key-01m8mrv65yrr7syrw4ace4','proj_default','2026-11-29 23:04:35.262909','key:first-admin','train','cc176d64f5e86a7c848909d3c57bed533fb54a6ede36b93f078ac6f981cb3280','["train"]',NULL,NULL);
INSERT INTO "api_keys" VALUES('key-01m8mrv66bg395fg1sfdmv','proj_default','2026-11-29 23:04:35.275528','key:first-admin','preview','62a12f5224a84d2a018f3177927296bee5740e3d1b8235710ded31645e0255b1','["preview"]',NULL,'2026-11-29 23:04:35.288005');
CREATE TABLE audit (
	id VARCHAR(40) NOT NULL, 
	project_id VARCHAR(40) NOT NULL, 
	at DATETIME NOT NULL, 
	actor VARCHAR(80) NOT NULL, 
	action VARCHAR(40) NOT NULL, 
	subject VARCHAR(120) NOT NULL, 
	"before" JSON, 
	"after" JSON, 
	reason TEXT, 
	CONSTRAINT pk_audit PRIMARY KEY (id)
);
INSERT INTO "audit" VALUES('audit-01m8mrv5hkfx4ss98ndhje','proj_default','2026-11-29 23:04:34.611895','system:first-start','key.create','first-admin','null','{"id": "key-01m8mrv5hjfd1d1pq83qzy", "scopes": ["admin"]}',NULL);
INSERT INTO "audit" VALUES('audit-01m8mrv65gyvanh6cy210c','proj_default','2026-11-29 23:04:35.248408','key:first-admin','key.create','inference','null','{"id": "key-01m8mrv65fp53t238bne53", "scopes": ["inference"]}',NULL);
INSERT INTO "audit" VALUES('audit-01m8mrv65zf1f0nt7h5sje','proj_default','2026-11-29 23:04:35.263771','key:first-admin','key.create','train','null','{"id": "key-01m8mrv65yrr7syrw4ace4", "scopes": ["train"]}',NULL);
INSERT INTO "audit" VALUES('audit-01m8mrv66cph4mhvw1ayav','proj_default','2026-11-29 23:04:35.276313','key:first-admin','key.create','preview','null','{"id": "key-01m8mrv66bg395fg1sfdmv", "scopes": ["preview"]}',NULL);
INSERT INTO "audit" VALUES('audit-01m8mrv66sg8q1199hw7sj','proj_default','2026-11-29 23:04:35.289073','key:first-admin','key.revoke','preview','{"id": "key-01m8mrv66bg395fg1sfdmv"}','null',NULL);
INSERT INTO "audit" VALUES('audit-01m8mrv68ng5hccy8c4qxr','proj_default','2026-11-29 23:04:35.350018','key:first-admin','version.publish','support@1','null','{"digest": "7885ccc27ca215712d5f5a0dc24d2fdb02beee9faf52c85cc4b8044c6b699a78", "manifest_digest": "26e7aad37932af82881965ada857cb69de87216c3dfa2595ee2a2b05b1d9c935", "job_id": null, "parent": null}',NULL);
INSERT INTO "audit" VALUES('audit-01m8mrv68rsxvvsa0tm9sk','proj_default','2026-11-29 23:04:35.352054','key:first-admin','route.create','support','null','{"stable": "tiny", "variants": [{"target": "tiny", "weight": 100}]}',NULL);
INSERT INTO "audit" VALUES('audit-01m8mrv6a01gxfjm0yk42z','proj_default','2026-11-29 23:04:35.392660','key:first-admin','version.publish','support@2','null','{"digest": "c99000235b4d0c7b0e1aeb9d38876ec5bcee0c40092f83428e9c5c5fbd2798da", "manifest_digest": "2b61c85014ff937cec5dfe05239afe6b3111c37bbc1fe346bfe57c83f3db751d", "job_id": null, "parent": null}',NULL);
INSERT INTO "audit" VALUES('audit-01m8mrv6asmd5n0jhbm3tn','proj_default','2026-11-29 23:04:35.417167','key:first-admin','version.publish','support@3','null','{"digest": "be252cdab8852ddbcfed8e39b616403637f7573124fd14c1497bdb8fcc824b27", "manifest_digest": "b6cd4c2a1701834056b4dfa4918a5c4a3de7e2fac30c19aef8a74b11c1f607e4", "job_id": null, "parent": null}',NULL);
INSERT INTO "audit" VALUES('audit-01m8mrv76af7yfekkrnp6f','proj_default','2026-11-29 23:04:36.298618','controller','version.state','support@1','{"state": "received"}','{"state": "verified", "code": null}',NULL);
INSERT INTO "audit" VALUES('audit-01m8mrv7tqwnpbn2zme5gn','proj_default','2026-11-29 23:04:36.951791','controller','version.state','support@2','{"state": "received"}','{"state": "verified", "code": null}',NULL);
INSERT INTO "audit" VALUES('audit-01m8mrv8fxmnqsnypmbsds','proj_default','2026-11-29 23:04:37.629849','controller','version.state','support@3','{"state": "received"}','{"state": "verified", "code": null}',NULL);
INSERT INTO "audit" VALUES('audit-01m8mrv8njssy6j3a5dh5b','proj_default','2026-11-29 23:04:37.810121','key:first-admin','route.promote','support','{"revision": 1, "stable": "tiny", "previous": "tiny", "candidate": null, "variants": [{"target": "tiny", "weight": 100}], "gates": []}','{"revision": 2, "stable": "support@1", "previous": "tiny", "candidate": null, "variants": [{"target": "support@1", "weight": 100}], "gates": [], "force": true}','for the fixture');
INSERT INTO "audit" VALUES('audit-01m8mrv8p7bzvg0s3scenc','proj_default','2026-11-29 23:04:37.831526','key:first-admin','route.promote','support','{"revision": 2, "stable": "support@1", "previous": "tiny", "candidate": null, "variants": [{"target": "support@1", "weight": 100}], "gates": []}','{"revision": 3, "stable": "support@2", "previous": "support@1", "candidate": null, "variants": [{"target": "support@2", "weight": 100}], "gates": [], "force": true}','for the fixture');
INSERT INTO "audit" VALUES('audit-01m8mrv8psys88fftsg0fg','proj_default','2026-11-29 23:04:37.849206','key:first-admin','route.rollback','support','{"revision": 3, "stable": "support@2", "previous": "support@1", "candidate": null, "variants": [{"target": "support@2", "weight": 100}], "gates": []}','{"revision": 4, "stable": "support@1", "previous": "tiny", "candidate": null, "variants": [{"target": "support@1", "weight": 100}], "gates": []}','for the fixture');
INSERT INTO "audit" VALUES('audit-01m8mrv8q9wcn0s9d2ee40','proj_default','2026-11-29 23:04:37.865915','key:first-admin','file.create','file-01m8mrv8q6cqxx282tq0yg','null','{"filename": "train.jsonl", "digest": "ce85314f6a0d1002b3eaea960f5fdfeaccf72689b02cb28f281f4530185b1451", "size_bytes": 1252}',NULL);
INSERT INTO "audit" VALUES('audit-01m8mrv8r1db8mcwpf93pt','proj_default','2026-11-29 23:04:37.889404','key:first-admin','job.create','ftjob-01m8mrv8qfpcbzgnb49299','null','{"kind": "fine_tuning", "model": "tiny", "adapter": "tickets", "training_file": "file-01m8mrv8q6cqxx282tq0yg", "validation_file": null, "recipe": "sft", "preset": null, "hyperparameters": {}, "seed": 0, "suffix": "tickets", "metadata": {}}',NULL);
INSERT INTO "audit" VALUES('audit-01m8mrvasrew1wjwgmartt','proj_default','2026-11-29 23:04:39.992966','key:first-admin','version.publish','tickets@1','null','{"digest": "9adccbc2513956506eac9d74dab3f10ab4cb192fe08351eadcb65efdb90718d6", "manifest_digest": "6e2279f6d440865c6802d097f464b80f97d4c972a2a41b12548cea4fff3c3b44", "job_id": "ftjob-01m8mrv8qfpcbzgnb49299", "parent": null}',NULL);
INSERT INTO "audit" VALUES('audit-01m8mrvatdrmar6tana8z3','proj_default','2026-11-29 23:04:40.013664','key:first-admin','route.create','tickets','null','{"stable": "tiny", "variants": [{"target": "tiny", "weight": 100}]}',NULL);
INSERT INTO "audit" VALUES('audit-01m8mrvcj9mffm1kjfmwq1','proj_default','2026-11-29 23:04:41.801834','controller','version.state','tickets@1','{"state": "received"}','{"state": "verified", "code": null}',NULL);
INSERT INTO "audit" VALUES('audit-01m8mrvd5wns53rw0t33jd','proj_default','2026-11-29 23:04:42.428387','key:first-admin','job.create','evaljob-01m8mrvd5n3n10yr81h8vw','null','{"kind": "evaluation", "target": "support@1", "digest": "7885ccc27ca215712d5f5a0dc24d2fdb02beee9faf52c85cc4b8044c6b699a78", "suite": "emails", "suite_digest": "86f1344770240160e00ecaf0cded66ebf8274857adce92ef6dbeadfd24f016b1", "stable": "support@1", "look": 1}',NULL);
INSERT INTO "audit" VALUES('audit-01m8mrvdn1hq9v8zv4kgfq','proj_default','2026-11-29 23:04:42.913387','controller','key.create','evaljob-01m8mrvd5n3n10yr81h8vw attempt 1','null','{"id": "key-01m8mrvdn06ymc1qr3dhgw", "scopes": ["evaluate", "inference", "preview"]}',NULL);
INSERT INTO "audit" VALUES('audit-01m8mrve843zjqr42mv684','proj_default','2026-11-29 23:04:43.524409','controller','key.revoke','evaljob-01m8mrvd5n3n10yr81h8vw attempt 1','{"id": "key-01m8mrvdn06ymc1qr3dhgw"}','null',NULL);
INSERT INTO "audit" VALUES('audit-01m8mrve963s5s3rz95rj7','proj_default','2026-11-29 23:04:43.559016','key:first-admin','verdict','support@1','null','{"verdict": "passed", "suite": "emails", "looks": 1, "job": "evaljob-01m8mrvd5n3n10yr81h8vw"}','gain +0.9');
INSERT INTO "audit" VALUES('audit-01m8mrveb02zn5xj3at2pp','proj_default','2026-11-29 23:04:43.616253','key:first-admin','route.set_variants','support','{"revision": 4, "stable": "support@1", "previous": "tiny", "candidate": null, "variants": [{"target": "support@1", "weight": 100}], "gates": []}','{"revision": 5, "stable": "support@1", "previous": "tiny", "candidate": null, "variants": [{"target": "support@1", "weight": 80}, {"target": "support@3", "weight": 20}], "gates": [], "force": true}','first users');
CREATE TABLE exposures (
	request_id VARCHAR(40) NOT NULL, 
	project_id VARCHAR(40) NOT NULL, 
	at DATETIME NOT NULL, 
	route VARCHAR(48) NOT NULL, 
	variant VARCHAR(64) NOT NULL, 
	version VARCHAR(64) NOT NULL, 
	digest VARCHAR(64) NOT NULL, 
	unit VARCHAR(64) NOT NULL, 
	replica_id VARCHAR(40) NOT NULL, 
	status INTEGER NOT NULL, 
	finish_reason VARCHAR(20), 
	latency_s FLOAT NOT NULL, 
	first_token_s FLOAT, 
	prompt_tokens INTEGER, 
	completion_tokens INTEGER, 
	CONSTRAINT pk_exposures PRIMARY KEY (request_id)
);
CREATE TABLE files (
	id VARCHAR(40) NOT NULL, 
	project_id VARCHAR(40) NOT NULL, 
	created_at DATETIME NOT NULL, 
	created_by VARCHAR(80) NOT NULL, 
	filename VARCHAR(255) NOT NULL, 
	purpose VARCHAR(40) NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	digest VARCHAR(64) NOT NULL, 
	deleted_at DATETIME, 
	CONSTRAINT pk_files PRIMARY KEY (id)
);
INSERT INTO "files" VALUES('file-01m8mrv8q6cqxx282tq0yg','proj_default','2026-11-29 23:04:37.863008','key:first-admin','train.jsonl','fine-tune',1252,'ce85314f6a0d1002b3eaea960f5fdfeaccf72689b02cb28f281f4530185b1451',NULL);
CREATE TABLE job_attempts (
	job_id VARCHAR(40) NOT NULL, 
	attempt INTEGER NOT NULL, 
	token_hash VARCHAR(64) NOT NULL, 
	started_at DATETIME NOT NULL, 
	heartbeat_at DATETIME NOT NULL, 
	finished_at DATETIME, 
	progress_offset BIGINT NOT NULL, 
	outcome VARCHAR(20), 
	CONSTRAINT pk_job_attempts PRIMARY KEY (job_id, attempt)
);
INSERT INTO "job_attempts" VALUES('verify-01m8mrv6h2mn491es8tzhe',1,'772f846f0b9084ff7b3f906aaf682dfea4274cae5cbef3c2ed6b1f7cb1a2af6c','2026-11-29 23:04:35.669338','2026-11-29 23:04:35.669338','2026-11-29 23:04:36.308761',0,'succeeded');
INSERT INTO "job_attempts" VALUES('verify-01m8mrv6hjj2d6z7hdc5dh',1,'d1dce52a40946d4edce77a99de911cb25601c6eab3346591c693597de035a304','2026-11-29 23:04:36.320955','2026-11-29 23:04:36.320955','2026-11-29 23:04:36.956195',0,'succeeded');
INSERT INTO "job_attempts" VALUES('verify-01m8mrv6hnajbjcpk6kaf7',1,'fe9c22d59b1233b07cee41d27f2f6e84f55e71031126f1944e4fb01e10b73573','2026-11-29 23:04:36.978216','2026-11-29 23:04:36.978216','2026-11-29 23:04:37.634664',0,'succeeded');
INSERT INTO "job_attempts" VALUES('ftjob-01m8mrv8qfpcbzgnb49299',1,'c5edd55cfd0fee65d0bad572b4836c8196ea76383e5abb62da9a630c7509eb8f','2026-11-29 23:04:38.175562','2026-11-29 23:04:39.273131','2026-11-29 23:04:39.400349',106,'succeeded');
INSERT INTO "job_attempts" VALUES('verify-01m8mrvbcz3s1h5dfmjj3g',1,'a90531a27c42f85157cb1e482a36f9c312e521e2d0ca093b984495ed8f9b2560','2026-11-29 23:04:40.654834','2026-11-29 23:04:40.654834','2026-11-29 23:04:41.815190',0,'succeeded');
INSERT INTO "job_attempts" VALUES('evaljob-01m8mrvd5n3n10yr81h8vw',1,'f39acfbce4c021d7ec7cbb2f956896d118a451a9203842e304cac8678cbf9674','2026-11-29 23:04:42.885295','2026-11-29 23:04:43.460942','2026-11-29 23:04:43.561868',106,'succeeded');
CREATE TABLE job_events (
	id VARCHAR(40) NOT NULL, 
	job_id VARCHAR(40) NOT NULL, 
	at DATETIME NOT NULL, 
	level VARCHAR(10) NOT NULL, 
	type VARCHAR(20) NOT NULL, 
	message TEXT NOT NULL, 
	data JSON, 
	CONSTRAINT pk_job_events PRIMARY KEY (id)
);
INSERT INTO "job_events" VALUES('ftevent-01m8mrv6jq19qm9wpzg35c','verify-01m8mrv6h2mn491es8tzhe','2026-11-29 23:04:35.671757','info','message','The job has started (attempt 1).','null');
INSERT INTO "job_events" VALUES('ftevent-01m8mrv772kb5qrc4cy723','verify-01m8mrv6hjj2d6z7hdc5dh','2026-11-29 23:04:36.322313','info','message','The job has started (attempt 1).','null');
INSERT INTO "job_events" VALUES('ftevent-01m8mrv7vkpnmp3eg5v34k','verify-01m8mrv6hnajbjcpk6kaf7','2026-11-29 23:04:36.979485','info','message','The job has started (attempt 1).','null');
INSERT INTO "job_events" VALUES('ftevent-01m8mrv8r2ryn87zbv9m4y','ftjob-01m8mrv8qfpcbzgnb49299','2026-11-29 23:04:37.890581','info','message','Created fine-tuning job: ftjob-01m8mrv8qfpcbzgnb49299','null');
INSERT INTO "job_events" VALUES('ftevent-01m8mrv90jd2t5rxe8dwnw','ftjob-01m8mrv8qfpcbzgnb49299','2026-11-29 23:04:38.162602','info','message','Files validated, moving job to queued state','null');
INSERT INTO "job_events" VALUES('ftevent-01m8mrv91224gjgs2ss6yj','ftjob-01m8mrv8qfpcbzgnb49299','2026-11-29 23:04:38.178805','info','message','The job has started (attempt 1).','null');
INSERT INTO "job_events" VALUES('ftevent-01m8mrva3b3c21jjkvq4my','ftjob-01m8mrv8qfpcbzgnb49299','2026-11-29 23:04:38.831714','info','metrics','step','{"loss": 0.5}');
INSERT INTO "job_events" VALUES('ftevent-01m8mrvav1vg0mmvzbpatb','ftjob-01m8mrv8qfpcbzgnb49299','2026-11-29 23:04:40.033411','info','message','Published tickets@1; verifying and loading it','null');
INSERT INTO "job_events" VALUES('ftevent-01m8mrvbegsannks9cdcrg','verify-01m8mrvbcz3s1h5dfmjj3g','2026-11-29 23:04:40.656340','info','message','The job has started (attempt 1).','null');
INSERT INTO "job_events" VALUES('ftevent-01m8mrvd3fcp7qa7nrnrdh','ftjob-01m8mrv8qfpcbzgnb49299','2026-11-29 23:04:42.351373','info','message','The job has successfully completed','null');
INSERT INTO "job_events" VALUES('ftevent-01m8mrvd5wvwzks90swgd6','evaljob-01m8mrvd5n3n10yr81h8vw','2026-11-29 23:04:42.428899','info','message','Created evaluation of support@1 on suite emails','null');
INSERT INTO "job_events" VALUES('ftevent-01m8mrvdm6wfa47p2adsn5','evaljob-01m8mrvd5n3n10yr81h8vw','2026-11-29 23:04:42.886497','info','message','The job has started (attempt 1).','null');
INSERT INTO "job_events" VALUES('ftevent-01m8mrve65jrbsvpqear9q','evaljob-01m8mrvd5n3n10yr81h8vw','2026-11-29 23:04:43.260252','info','metrics','step','{"loss": 0.5}');
CREATE TABLE jobs (
	id VARCHAR(40) NOT NULL, 
	project_id VARCHAR(40) NOT NULL, 
	created_at DATETIME NOT NULL, 
	created_by VARCHAR(80) NOT NULL, 
	kind VARCHAR(16) NOT NULL, 
	state VARCHAR(20) NOT NULL, 
	spec JSON NOT NULL, 
	result JSON, 
	error_code VARCHAR(60), 
	error_message TEXT, 
	attempt INTEGER NOT NULL, 
	cancel_requested BOOLEAN NOT NULL, 
	started_at DATETIME, 
	finished_at DATETIME, 
	revision INTEGER NOT NULL, 
	CONSTRAINT pk_jobs PRIMARY KEY (id)
);
INSERT INTO "jobs" VALUES('verify-01m8mrv6h2mn491es8tzhe','proj_default','2026-11-29 23:04:35.618976','controller','verify','succeeded','{"kind": "verify", "target": "support@1", "digest": "7885ccc27ca215712d5f5a0dc24d2fdb02beee9faf52c85cc4b8044c6b699a78"}','{"log_loss": 3.1, "base_log_loss": 3.2}',NULL,NULL,1,0,'2026-11-29 23:04:35.670567','2026-11-29 23:04:36.310006',2);
INSERT INTO "jobs" VALUES('verify-01m8mrv6hjj2d6z7hdc5dh','proj_default','2026-11-29 23:04:35.634614','controller','verify','succeeded','{"kind": "verify", "target": "support@2", "digest": "c99000235b4d0c7b0e1aeb9d38876ec5bcee0c40092f83428e9c5c5fbd2798da"}','{"log_loss": 3.1, "base_log_loss": 3.2}',NULL,NULL,1,0,'2026-11-29 23:04:36.321614','2026-11-29 23:04:36.956798',2);
INSERT INTO "jobs" VALUES('verify-01m8mrv6hnajbjcpk6kaf7','proj_default','2026-11-29 23:04:35.637573','controller','verify','succeeded','{"kind": "verify", "target": "support@3", "digest": "be252cdab8852ddbcfed8e39b616403637f7573124fd14c1497bdb8fcc824b27"}','{"log_loss": 3.1, "base_log_loss": 3.2}',NULL,NULL,1,0,'2026-11-29 23:04:36.978889','2026-11-29 23:04:37.635170',2);
INSERT INTO "jobs" VALUES('ftjob-01m8mrv8qfpcbzgnb49299','proj_default','2026-11-29 23:04:37.871717','key:first-admin','fine_tuning','succeeded','{"kind": "fine_tuning", "model": "tiny", "adapter": "tickets", "training_file": "file-01m8mrv8q6cqxx282tq0yg", "validation_file": null, "recipe": "sft", "preset": null, "hyperparameters": {}, "seed": 0, "suffix": "tickets", "metadata": {}}','{"trained_tokens": 1234, "metrics": {"loss": 0.25, "worst": null}, "version": "tickets@1", "digest": "9adccbc2513956506eac9d74dab3f10ab4cb192fe08351eadcb65efdb90718d6", "fine_tuned_model": "tickets@1"}',NULL,NULL,1,0,'2026-11-29 23:04:38.177858','2026-11-29 23:04:42.350504',5);
INSERT INTO "jobs" VALUES('verify-01m8mrvbcz3s1h5dfmjj3g','proj_default','2026-11-29 23:04:40.607529','controller','verify','succeeded','{"kind": "verify", "target": "tickets@1", "digest": "9adccbc2513956506eac9d74dab3f10ab4cb192fe08351eadcb65efdb90718d6"}','{"log_loss": 3.1, "base_log_loss": 3.2}',NULL,NULL,1,0,'2026-11-29 23:04:40.655617','2026-11-29 23:04:41.820143',2);
INSERT INTO "jobs" VALUES('evaljob-01m8mrvd5n3n10yr81h8vw','proj_default','2026-11-29 23:04:42.426779','key:first-admin','evaluation','succeeded','{"kind": "evaluation", "target": "support@1", "digest": "7885ccc27ca215712d5f5a0dc24d2fdb02beee9faf52c85cc4b8044c6b699a78", "suite": "emails", "suite_digest": "86f1344770240160e00ecaf0cded66ebf8274857adce92ef6dbeadfd24f016b1", "stable": "support@1", "look": 1}','{"verdict": "passed", "reason": "gain +0.9", "fingerprint": "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff", "report": {"rows": []}, "looks": 1}',NULL,NULL,1,0,'2026-11-29 23:04:42.885885','2026-11-29 23:04:43.567558',2);
CREATE TABLE leases (
	name VARCHAR(40) NOT NULL, 
	holder VARCHAR(80) NOT NULL, 
	expires_at DATETIME NOT NULL, 
	epoch INTEGER NOT NULL, 
	CONSTRAINT pk_leases PRIMARY KEY (name)
);
INSERT INTO "leases" VALUES('controller','','2026-11-29 23:04:44.117478',1);
CREATE TABLE processes (
	id VARCHAR(80) NOT NULL, 
	kind VARCHAR(16) NOT NULL, 
	pid INTEGER NOT NULL, 
	started FLOAT NOT NULL, 
	argv_digest VARCHAR(64) NOT NULL, 
	attempt INTEGER NOT NULL, 
	CONSTRAINT pk_processes PRIMARY KEY (id)
);
CREATE TABLE replicas (
	id VARCHAR(40) NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	reason TEXT, 
	started_at DATETIME, 
	socket VARCHAR(255) NOT NULL, 
	epoch VARCHAR(40) NOT NULL, 
	self_test VARCHAR(16) NOT NULL, 
	revision INTEGER NOT NULL, 
	CONSTRAINT pk_replicas PRIMARY KEY (id)
);
INSERT INTO "replicas" VALUES('engine-0','stopped',NULL,'2026-11-29 23:04:34.105500','@HOME@/run/engine-0.sock','20116-1924.43','passed',3);
CREATE TABLE residency (
	replica_id VARCHAR(40) NOT NULL, 
	engine_name VARCHAR(96) NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	code VARCHAR(40), 
	reason TEXT, 
	updated_at DATETIME NOT NULL, 
	CONSTRAINT pk_residency PRIMARY KEY (replica_id, engine_name)
);
CREATE TABLE revisions (
	name VARCHAR(40) NOT NULL, 
	value BIGINT NOT NULL, 
	CONSTRAINT pk_revisions PRIMARY KEY (name)
);
INSERT INTO "revisions" VALUES('routing',39);
CREATE TABLE routes (
	name VARCHAR(48) NOT NULL, 
	project_id VARCHAR(40) NOT NULL, 
	created_at DATETIME NOT NULL, 
	created_by VARCHAR(80) NOT NULL, 
	revision INTEGER NOT NULL, 
	salt VARCHAR(64) NOT NULL, 
	stable VARCHAR(64) NOT NULL, 
	previous VARCHAR(64) NOT NULL, 
	candidate VARCHAR(64), 
	variants JSON NOT NULL, 
	gates JSON NOT NULL, 
	updated_at DATETIME NOT NULL, 
	updated_by VARCHAR(80) NOT NULL, 
	CONSTRAINT pk_routes PRIMARY KEY (name)
);
INSERT INTO "routes" VALUES('support','proj_default','2026-11-29 23:04:35.351049','key:first-admin',5,'1d4ce38b52efd33a32d091395ab5c5e7','support@1','tiny',NULL,'[{"target": "support@1", "weight": 80}, {"target": "support@3", "weight": 20}]','[]','2026-11-29 23:04:43.613051','key:first-admin');
INSERT INTO "routes" VALUES('tickets','proj_default','2026-11-29 23:04:40.011512','key:first-admin',1,'cdd32a2f144011fd0ac96cc9f21cd76b','tiny','tiny',NULL,'[{"target": "tiny", "weight": 100}]','[]','2026-11-29 23:04:40.011512','key:first-admin');
CREATE TABLE verdicts (
	id VARCHAR(40) NOT NULL, 
	project_id VARCHAR(40) NOT NULL, 
	created_at DATETIME NOT NULL, 
	created_by VARCHAR(80) NOT NULL, 
	digest VARCHAR(64) NOT NULL, 
	suite VARCHAR(80) NOT NULL, 
	suite_digest VARCHAR(64) NOT NULL, 
	fingerprint VARCHAR(64) NOT NULL, 
	baseline VARCHAR(64) NOT NULL, 
	verdict VARCHAR(16) NOT NULL, 
	reason TEXT NOT NULL, 
	report JSON NOT NULL, 
	job_id VARCHAR(40) NOT NULL, 
	looks INTEGER NOT NULL, 
	CONSTRAINT pk_verdicts PRIMARY KEY (id), 
	CONSTRAINT uq_verdicts_digest_suite UNIQUE (digest, suite_digest, fingerprint, baseline)
);
INSERT INTO "verdicts" VALUES('verdict-01m8mrve90ynmyzgvzr1hy','proj_default','2026-11-29 23:04:43.552163','key:first-admin','7885ccc27ca215712d5f5a0dc24d2fdb02beee9faf52c85cc4b8044c6b699a78','emails','86f1344770240160e00ecaf0cded66ebf8274857adce92ef6dbeadfd24f016b1','ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff','7885ccc27ca215712d5f5a0dc24d2fdb02beee9faf52c85cc4b8044c6b699a78','passed','gain +0.9','{"rows": []}','evaljob-01m8mrvd5n3n10yr81h8vw',1);
CREATE INDEX ix_adapter_versions_digest ON adapter_versions (digest);
CREATE INDEX ix_adapter_versions_project_id ON adapter_versions (project_id);
CREATE INDEX ix_adapters_project_id ON adapters (project_id);
CREATE INDEX ix_api_keys_project_id ON api_keys (project_id);
CREATE INDEX ix_audit_at ON audit (at);
CREATE INDEX ix_audit_project_id ON audit (project_id);
CREATE INDEX ix_audit_subject ON audit (subject);
CREATE INDEX ix_exposures_at ON exposures (at);
CREATE INDEX ix_exposures_route_at ON exposures (route, at);
CREATE INDEX ix_files_project_id ON files (project_id);
CREATE INDEX ix_job_events_job_id ON job_events (job_id);
CREATE INDEX ix_jobs_kind ON jobs (kind);
CREATE INDEX ix_jobs_project_id ON jobs (project_id);
CREATE INDEX ix_jobs_state ON jobs (state);
CREATE INDEX ix_routes_project_id ON routes (project_id);
CREATE INDEX ix_verdicts_project_id ON verdicts (project_id);
CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
CREATE TRIGGER audit_no_replace BEFORE INSERT ON audit WHEN EXISTS (SELECT 1 FROM audit WHERE id = NEW.id) BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
CREATE TRIGGER adapter_versions_identity BEFORE UPDATE ON adapter_versions WHEN OLD."id" IS NOT NEW."id" OR OLD."project_id" IS NOT NEW."project_id" OR OLD."created_at" IS NOT NEW."created_at" OR OLD."created_by" IS NOT NEW."created_by" OR OLD."adapter" IS NOT NEW."adapter" OR OLD."version" IS NOT NEW."version" OR OLD."digest" IS NOT NEW."digest" OR OLD."manifest_digest" IS NOT NEW."manifest_digest" OR OLD."base_model" IS NOT NEW."base_model" OR OLD."base_digest" IS NOT NEW."base_digest" OR OLD."rank" IS NOT NEW."rank" OR OLD."size_bytes" IS NOT NEW."size_bytes" OR OLD."parent" IS NOT NEW."parent" OR OLD."job_id" IS NOT NEW."job_id" BEGIN SELECT RAISE(ABORT, 'a published version is immutable'); END;
CREATE TRIGGER adapter_versions_no_delete BEFORE DELETE ON adapter_versions BEGIN SELECT RAISE(ABORT, 'a published version is immutable'); END;
CREATE TRIGGER adapter_versions_no_replace BEFORE INSERT ON adapter_versions WHEN EXISTS (SELECT 1 FROM adapter_versions WHERE id = NEW.id OR (adapter = NEW.adapter AND (version = NEW.version OR digest = NEW.digest))) BEGIN SELECT RAISE(ABORT, 'UNIQUE constraint failed: a published version is immutable'); END;
COMMIT;
